"""``alignkit explain``: where values come from and what reads them; ``alignkit diff``: what two runs do not share."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from running import SMALL_CAUSAL, SMALL_SFT, command, composed, train

from alignkit.catalog import options
from alignkit.cli import hydra_words
from alignkit.config import conf_dir
from alignkit.explain import readers, sources
from alignkit.origins import defaults, flat, layers, owner
from alignkit.signature import lineage

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


def chain(*words: str, key: str) -> list[tuple[str, str]]:
    """(value, place without its line) of all that sets a key, the winner first."""
    cfg = composed([*words])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = sources(cfg, key, layers(hydra_words([*words])))
    return [(one.value, re.sub(r":\d+.*$", "", one.where)) for one in found]


# ---- where a value comes from ----------------------------------------------------------------------------------


def test_the_whole_chain_of_a_setting() -> None:
    """Word over preset over method over class, as the files say."""
    assert chain("+preset=esrl_translation", "algo.lr=1e-3", key="algo.lr") == [
        ("0.001", "algo.lr=1e-3"),
        ("3e-05", "conf/preset/esrl_translation.yaml"),
        ("0.0001", "conf/algo/esrl.yaml"),
        ("1e-05", "alignkit/algos/_rl.py"),
    ]


def test_a_base_file_and_the_schema() -> None:
    assert chain("+algo=kd", key="evaluate.select") == [
        ("accuracy", "conf/algo/_distill.yaml"),
        ("bleu", "alignkit/config.py"),
    ]
    assert chain("+algo=dpo", "evaluate.every=3", key="evaluate.every")[:2] == [
        ("3", "evaluate.every=3"),
        ("20", "conf/algo/dpo.yaml"),
    ]
    assert chain("+algo=esrl", "data.limit=3", "data.limit=4", key="data.limit")[:2] == [
        ("4", "data.limit=4"),
        ("3", "data.limit=3"),
    ]


def test_a_subclass_overrides_the_default_of_its_base() -> None:
    own, base = defaults("alignkit.algos.ppo.PPO", "epochs")
    assert own.where.startswith("alignkit/algos/ppo.py:") and own.where.endswith("(PPO)")
    assert base.where.startswith("alignkit/algos/_rl.py:") and (own.value, base.value) == ("4", "1")


@pytest.mark.parametrize("name", sorted(options("algo")))
def test_the_winner_is_what_hydra_composes(name: str) -> None:
    """Of every key of every method: the first of the chain has the composed value, or, where no file sets it, the class's own
    default; and the line that is named holds the key."""
    words = [f"+algo={name}"]
    cfg = composed(words)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = layers(hydra_words(words))
    plain: Any = OmegaConf.to_container(cfg)
    for key, value in flat({k: v for k, v in plain.items() if k not in ("run", "name", "stage")}).items():
        if "_target_" in key or "???" in str(value):
            continue
        places = sources(cfg, key, found)
        if isinstance(value, bool | int | float | str) and places and "()" not in places[0].value:
            said = yaml.safe_load(places[0].value) if isinstance(value, bool | int | None) else places[0].value
            assert said == value or str(value) == places[0].value, (key, value, places[0])
        if places and re.match(r"conf/.*:\d+$", places[0].where):
            file, _, line = places[0].where.rpartition(":")
            assert key.rpartition(".")[2] in (ROOT / file).read_text().split("\n")[int(line) - 1]
    algo = cfg.algo.get("_target_")
    for field in dataclasses.fields(get_class(algo)) if algo else ():
        if field.name not in cfg.algo and field.default is not dataclasses.MISSING:
            assert sources(cfg, f"algo.{field.name}", found)[0].value == _written(field.default)


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_what_is_printed(cli: Cli) -> None:
    code, out, _ = cli("explain", "algo.lr", "+preset=esrl_translation", "algo.lr=1e-3")
    assert code == 0
    lines = out.split("\n")
    assert lines[0] == "algo.lr = 0.001   (float)"
    assert lines[1] == "  set by     algo.lr=1e-3"
    assert re.fullmatch(r"  overrides  \S*conf/preset/esrl_translation.yaml:13   3e-05", lines[2])
    assert "  peak learning rate of AdamW" in lines
    assert re.search(r"read by    \S*alignkit/algos/_rl.py:\d+  RL.rates   return \[factor \* self.lr\]", out)


def test_interpolations_and_missing_values(cli: Cli) -> None:
    out = cli("explain", "run.dir", "+algo=esrl")[1]
    assert re.match(r"run.dir = runs/esrl-s0-[0-9a-f]{8}   from \$\{run.root\}/\$\{run.name\}", out)
    assert "must be given" in cli("explain", "algo.base", "+algo=inverse_value")[1]


def test_a_section_lists_its_keys_and_who_chose_it(cli: Cli) -> None:
    code, out, _ = cli("explain", "reward", "+algo=esrl")
    assert code == 0
    assert re.search(r"chosen by  \S*conf/algo/esrl.yaml:6   nlg", out)
    assert re.search(r"overrides  \S*conf/config.yaml:6   null", out)
    assert "chosen by  reward=chrf   chrf" in cli("explain", "reward", "+algo=esrl", "reward=chrf")[1]
    listed = cli("explain", "algo", "+algo=esrl")[1]
    for field in dataclasses.fields(get_class("alignkit.algos.esrl.ESRL")):
        assert f"  algo.{field.name} " in listed


def test_a_method_that_is_not_named_is_missed(cli: Cli) -> None:
    assert cli("explain", "algo.lr") == (
        2, "", "error: explain: algo.lr is a setting of a method: name one with +algo=NAME, or a preset with +preset=NAME.\n",
    )  # fmt: skip
    assert "No method is named" in cli("explain", "run.threads")[1]
    assert "No method is named" not in cli("explain", "run.threads", "+algo=sft")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.lrr", "+algo=esrl"], "error: algo.lrr: no such key. Did you mean 'lr'?\n"),
        (["evaluate.beam"], "error: evaluate.beam: no such key. Did you mean 'beams'?\n"),
        (["rewrad"], "error: rewrad: no such key. Did you mean 'reward'?\n"),
        (
            ["reward.weights.blue", "+preset=esrl_translation"],
            "error: reward.weights.blue: no such key. Did you mean 'bleu'?\n",
        ),
        (["seed.x"], "error: explain: seed is a value, so seed.x is no key.\n"),
        (["algo.lr", "+algo=esrrl"], "error: +algo=esrrl: there is no such algo. Did you mean 'esrl'?\n"),
        ([], "error: explain: name one key, as in `alignkit explain algo.lr +algo=esrl`.\n"),
        (["a", "b"], "error: explain: name one key, as in `alignkit explain algo.lr +algo=esrl`.\n"),
        (["seed", "--verbose"], "error: explain: --verbose is no flag; there is --config-dir.\n"),
    ],
)
def test_mistakes(words: list[str], said: str, cli: Cli) -> None:
    code, out, err = cli("explain", *words)
    assert (code, out) == (2, "")
    assert err == said or (said.startswith("error: +algo") and err == said.replace("+algo", "algo"))


def test_files_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "own.py").write_text(
        "from dataclasses import dataclass\nfrom alignkit.algos.grpo import GRPO\n\n\n@dataclass(kw_only=True)\n"
        "class Own(GRPO):\n    sharpness: float = 2.0  # how sharp it is\n\n    def metrics(self, batch):\n"
        "        return {'sharpness': self.sharpness}\n"
    )
    (tmp_path / "mine" / "algo" / "own.yaml").write_text(
        "# @package _global_\ndefaults: [_rl, _self_]\nname: own\nstage: rl\nalgo:\n  _target_: own.Own\n  sharpness: 3.0\n"
    )
    (tmp_path / "mine" / "algo" / "_rl.yaml").write_text("# @package _global_\nstage: rl\n")
    code, out, err = cli("explain", "--config-dir", "mine", "algo.sharpness", "+algo=own")
    assert code == 0, err
    assert "set by     mine/algo/own.yaml:7" in out and "overrides  mine/own.py:7 (Own)   2.0" in out
    assert "how sharp it is" in out and "mine/own.py:10  Own.metrics" in out


# ---- what reads it ---------------------------------------------------------------------------------------------


def found(key: str, *words: str) -> set[tuple[str, str]]:
    """(file, function) of the readers of a key."""
    cfg = composed([*words])
    return {(one.file.name, one.function) for one in readers(cfg, *owner(cfg, key))}


def test_readers_of_a_method_a_stage_and_the_run() -> None:
    assert found("algo.k_max", "+algo=esrl") == {("esrl.py", "ESRL.sample")}
    assert {("rl.py", "run"), ("_rl.py", "RL.rates")} <= found("algo.steps", "+algo=esrl")
    assert not any(file == "fit.py" for file, _ in found("algo.steps", "+algo=esrl"))  # another stage's
    assert ("fit.py", "fit") in found("algo.batch_size", "+algo=sft")
    assert found("run.threads", "+algo=sft") == {("launch.py", "_run"), ("processes.py", "run")}
    assert ("evaluate.py", "HeldOut._decode") in found("evaluate.beams", "+algo=sft")
    assert ("audit.py", "Audit.look") in found("audit.window", "+algo=esrl")
    assert ("loading.py", "read") in found("model.dtype", "+algo=sft")
    assert ("loading.py", "_with_lora") in found("model.lora.alpha", "+algo=sft")
    assert ("_rl.py", "RL.rates") in found("algo.critic.lr", "+algo=ppo")
    assert ("mix.py", "Mix.__call__") in found("reward.weights.bleu", "+preset=esrl_translation")
    assert ("data.py", "Data.rows") in found("data.train", "+algo=sft")  # through getattr(self, split)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in sorted(options("algo"))
        if "_target_" in (yaml.safe_load(options("algo")[n].read_text()).get("algo") or {})
    ],
)
def test_every_setting_of_its_own_that_a_method_declares_has_a_reader_and_each_place_holds_it(name: str) -> None:
    cfg = composed([f"+algo={name}"])
    target = cfg.algo._target_
    own = {
        item.target.id
        for _, node in lineage(target)[:1]
        for item in node.body
        if hasattr(item, "target") and hasattr(item.target, "id")
    }
    for setting in sorted(own & {field.name for field in dataclasses.fields(get_class(target))}):
        places = readers(cfg, "algo", target, setting)
        assert places, setting
        for one in places:
            text = one.file.read_text().split("\n")[one.line - 1]
            assert setting in text or "getattr" in text


# ---- at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["explain algo.steps +algo=ppo", "explain model.path +algo=ppo", "explain algo +algo=esrl", "diff"]
)
def test_it_answers_at_once_and_without_torch(words: str, tmp_path: Path) -> None:
    """Half a second of CPU on an idle machine, a second allowed."""
    runs = [_written_run(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1))] if words == "diff" else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*words.split(), *map(str, runs), cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"alignkit {words}: {seconds:.2f} s of CPU")
    imports = {x.rpartition("|")[2].strip() for x in done.stderr.split("\n") if x.startswith("import time:")}
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "alignkit.cli" in imports and not imports & {"torch", "transformers", "numpy"} - (
        {"numpy"} if runs else set()
    )
    assert seconds < 1
    assert sorted(p.name for p in tmp_path.iterdir()) == (["a", "b"] if runs else [])


# ---- diff ------------------------------------------------------------------------------------------------------


def _written_run(folder: Path, seed: int = 0, **more: Any) -> Path:
    """A run's record, written by hand."""
    folder.mkdir(parents=True)
    config = {
        "name": "sft",
        "stage": "sft",
        "seed": seed,
        "algo": {"lr": 0.001},
        "run": {"root": str(folder), "threads": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | more.get("config", {})))
    (folder / "data.json").write_text(
        json.dumps({"rows": {"train": 4}, "sha256": {"data.train": more.get("train", "aa")}})
    )
    (folder / "environment.json").write_text(
        json.dumps({"packages": {"torch": more.get("torch", "2.11")}, "git_commit": "c0"})
    )
    (folder / "command.txt").write_text(f"alignkit train +algo=sft seed={seed}\n")
    return folder


def test_nothing_differs(cli: Cli, tmp_path: Path) -> None:
    """But where they lie."""
    _written_run(tmp_path / "a")
    _written_run(tmp_path / "b")
    code, out, err = cli("diff", "a", "b")
    assert (code, err) == (0, "")
    assert out.startswith("nothing differs: settings, data, packages, commit and command are the same.")


def test_what_differs_is_named_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    _written_run(tmp_path / "a")
    config = {"algo": {"lr": 0.0010000001, "kl": None}}
    _written_run(tmp_path / "b", seed=1, config=config, train="bb", torch="2.12")
    code, out, _ = cli("diff", "a", "b")
    assert code == 0
    rows = {x.split()[0]: x.split()[1:] for x in out.split("\n") if len(x.split()) > 2}
    assert rows["seed"] == ["0", "1"]
    assert rows["algo.lr"] == ["0.001", "0.0010000001"]  # all digits
    assert rows["algo.kl"] == ["no", "such", "key", "null"]  # null is a value
    assert rows["sha256.data.train"] == ["aa", "bb"]
    assert rows["packages.torch"] == ["2.11", "2.12"]
    assert rows["words"] == ["seed=0", "seed=1"]
    assert "git_commit" not in out and "run.threads" not in out and "rows.train" not in out


def test_two_real_runs(cli: Cli, tmp_path: Path) -> None:
    a, b = (
        train(tmp_path / "runs", *SMALL_SFT, *SMALL_CAUSAL, "algo.steps=2", *more)[1] for more in ([], ["algo.lr=1e-3"])
    )
    out = cli("diff", str(a), str(b))[1]
    assert "algo.lr" in out and "Data that differ" not in out and "Environment that differ" not in out
    shutil.copytree(a, tmp_path / "copy")
    assert cli("diff", str(a), str(tmp_path / "copy"))[1].startswith("nothing differs")


def test_bad_paths(cli: Cli, tmp_path: Path) -> None:
    a = _written_run(tmp_path / "runs" / "sft-s0")
    _written_run(tmp_path / "runs" / "sft-s1", seed=1)
    code, out, err = cli("diff", str(a), "runs/sft-s2")
    assert (code, out) == (2, "") and err.startswith(
        "error: runs/sft-s2: no such run or folder. Did you mean 'runs/sft-s"
    )
    code, _, err = cli("diff", str(a), "runs")
    assert code == 2 and "diff: runs holds 2 runs. Name one: runs/sft-s0, runs/sft-s1." in err
    assert cli("diff", str(a))[0] == 2
