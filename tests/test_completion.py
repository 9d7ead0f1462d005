"""What the tab key offers: the candidates, and bash asking for them; zsh and fish: test_completion_shells.py."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import command

from alignkit import catalog
from alignkit.cli import VERBS
from alignkit.completion import FLAGS, RUNS, SCRIPTS, candidates
from alignkit.config import GROUPS, schema_keys


def shell(*words: str, cwd: Path | None = None) -> str:
    """What a shell prints that finds this environment's ``alignkit``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PATH": path}, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def bash(line: str, cwd: Path | None = None) -> list[str]:
    """What bash has for a line, as it calls a completion: words cut at ``=``, the line beside them."""
    code = f"""source <(alignkit completion bash)
    COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS=$' \\t\\n"'"'"'><=;|&(:'
    COMP_WORDS=({line.replace("=", " = ")!s} ""); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
    _alignkit; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return [x for x in shell("bash", "--norc", "-c", code, cwd=cwd).split("\n") if x]


# ---- candidates ----------------------------------------------------------------------------------------------


def test_verbs() -> None:
    assert candidates([""]) == sorted(VERBS)
    assert candidates(["comp"]) == ["compare", "completion"]
    assert set(FLAGS) <= set(VERBS) and set(RUNS) <= set(VERBS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_group(group: str) -> None:
    word = f"{'+' if group in ('algo', 'preset') else ''}{group}="
    assert candidates(["train", word]) == sorted(f"{word}{name}" for name in catalog.options(group))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("train +algo=dpo_", ["+algo=dpo_pcrm"]),
        ("train algo=dpo_", ["algo=dpo_pcrm"]),
        ("train -m +algo=esrl,rlo", ["+algo=esrl,rloo"]),  # a sweep
        ("train +algo=grpo algo.cl", ["algo.clip="]),
        ("train +algo=dapo algo.cl", ["algo.clip_high=", "algo.clip_low="]),
        ("train +preset=esrl_translation algo.k_m", ["algo.k_max=", "algo.k_min="]),  # the preset's method
        ("train +algo=grpo algo.kl_in=", ["algo.kl_in=loss", "algo.kl_in=reward"]),
        ("train +algo=esrl model.lora.al", ["model.lora.alpha="]),
        ("train +algo=esrl run.ov", ["run.overwrite="]),
        ("train +algo=esrl run.overwrite=", ["run.overwrite=false", "run.overwrite=true"]),
        ("train +algo=esrl evaluate.decode=", [f"evaluate.decode={x}" for x in ("beam", "greedy", "sample")]),
        ("train +algo=esrl data.un", ["data.unique="]),
        ("train +algo=esrl reward=length reward.ta", ["reward.target="]),
        ("train +algo=srt_collect cri", ["critic="]),
        ("train +algo=esrl cri", []),  # it has no critic
        ("train +algo=es mo", ["model.", "model="]),
        ("train +a", ["+algo="]),
        ("train +algo=esrl +p", []),  # one is chosen
        ("train --con", ["--config-dir"]),
        ("show settin", ["settings"]),
        ("show esrl_r", ["esrl_released"]),
        ("claim ks", ["ksm"]),
        ("claim ksm run.ro", ["run.root="]),
        ("from-trl x.yaml --trainer r", ["reward", "rloo"]),
        ("completion f", ["fish"]),
        ("nonsense x", []),
        ("train +algo=nosuch algo.k", []),
        ("train --config-dir nowhere +algo=esrl algo.k_m", ["algo.k_max=", "algo.k_min="]),
    ],
)  # fmt: skip
def test_candidates(line: str, wanted: list[str]) -> None:
    assert candidates(line.split(" ")) == wanted


@pytest.mark.parametrize("node", ["model", "evaluate", "run", "audit"])
def test_every_key_of_the_schema(node: str) -> None:
    found = candidates(["train", "+algo=sft", f"{node}."])
    assert {word.split(".")[1].rstrip("=") for word in found} == set(schema_keys(node) or ())


def test_run_directories_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/esrl-s0-1", "runs/esrl-s1-2", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("a: 1\n" * name.startswith("runs"), encoding="utf-8")
    (tmp_path / "other" / "config.yaml").unlink()
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for verb in RUNS:
        assert candidates([verb, "ru"]) == ["runs/"]
        assert candidates([verb, "runs/"]) == ["runs/esrl-s0-1", "runs/esrl-s1-2"]
    assert candidates(["compare", "runs/esrl-s0-1", "runs/esrl-s1"]) == ["runs/esrl-s1-2"]
    assert candidates(["evaluate", "runs/esrl-s0-1", "evaluate.bea"]) == ["evaluate.beams="]
    assert candidates(["from-trl", ""]) == ["c.yaml", "other/", "runs/"]
    assert candidates(["train", "+algo=sft", "data=custom", "data.train=ro"]) == ["data.train=rows.jsonl"]
    assert candidates(["train", "+algo=sft", "model.path=runs/esrl-s0"]) == ["model.path=runs/esrl-s0-1"]


def test_options_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "my_method.yaml").write_text("algo: {_target_: alignkit.algos.rloo.RLOO}\n", encoding="utf-8")
    assert candidates(["train", "--config-dir", str(tmp_path), "+algo=my"]) == ["+algo=my_method"]
    assert candidates(["train", f"--config-dir={tmp_path}", "+algo=my_method", "algo.wh"]) == ["algo.whiten="]


# ---- the program and bash ------------------------------------------------------------------------------------


def test_it_names_a_shell(cli: Callable[..., tuple[int, str, str]]) -> None:
    for name, script in SCRIPTS.items():
        assert cli("completion", name) == (0, script, "")
    assert "Did you mean 'fish'" in cli("completion", "fsh")[2]
    assert cli("completion")[0] == 2


def test_it_answers_at_once(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(
        "completion", "--words", "train", "+algo=esrl", "algo.k_m", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.split("\n") if line.startswith("import time:")}
    assert done.stdout == "algo.k_max=\nalgo.k_min=\n"
    assert "alignkit.catalog" in imports and not imports & {"torch", "hydra", "transformers"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6  # 0.15 on an idle machine


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("alignkit comp", ["compare", "completion"]),
        ("alignkit show esrl_r", ["esrl_released"]),
        ("alignkit train +algo=dpo_", ["dpo_pcrm"]),  # bash completes what stands behind the sign
        ("alignkit train +algo=grpo algo.kl_in=", ["loss", "reward"]),
        ("alignkit train +algo=grpo algo.cl", ["algo.clip="]),
        ("alignkit claim ", sorted(catalog.options("claim"))),
        ("alignkit evaluate runs/e", ["runs/esrl-s0-1"]),
    ],
)
def test_bash(line: str, wanted: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "esrl-s0-1").mkdir(parents=True)
    (tmp_path / "runs" / "esrl-s0-1" / "config.yaml").write_text("", encoding="utf-8")
    assert bash(line, tmp_path) == wanted


def test_a_bash_that_sets_no_line() -> None:
    code = 'source <(alignkit completion bash); COMP_WORDS=(alignkit show esrl_r); COMP_CWORD=2; _alignkit; echo "${COMPREPLY[@]}"'
    assert shell("bash", "--norc", "-c", code) == "esrl_released\n"
