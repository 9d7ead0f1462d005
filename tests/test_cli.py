"""The verbs: what they print, how they exit, and that they answer at once."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import resource
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_class
from running import command, composed

from alignkit import __version__, catalog
from alignkit.cli import USAGE, VERBS, evaluate_words
from alignkit.config import GROUPS, check, conf_dir
from alignkit.errors import UserError

CONF = conf_dir()


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if not p.stem.startswith("_"))


def content(group: str, name: str) -> dict[str, Any]:
    try:
        return yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:  # one bad file must not keep the tests of the others from being collected
        return {}


EVERY = [(g, n) for g in GROUPS for n in names(g)]
CLASSES = [n for n in names("algo") if "_target_" in (content("algo", n).get("algo") or {})]


# ---- at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("", 0, "alignkit train +algo=NAME"),
        ("--help", 0, "alignkit train +algo=NAME"),
        ("list", 0, "+algo=esrl"),
        ("show esrl", 0, "2308.02223"),
        ("explain algo.lr +algo=esrl", 0, "peak learning rate"),
        ("doctor", None, "transformers"),
        ("train", 2, "+algo=esrl"),
        ("train --help", 0, "Powered by Hydra"),
        ("train +algo=esrl --cfg job", 0, "_target_: alignkit.algos.esrl.ESRL"),
        ("trian", 2, "Did you mean 'train'?"),
    ],
)
def test_it_answers_at_once(words: str, code: int | None, says: str, tmp_path: Path) -> None:
    """Under a second of CPU on an idle machine, two allowed, for others work beside it; no torch (which takes more), no traceback, no file."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*words.split(), cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"alignkit {words}: {seconds:.2f} s of CPU")
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.split("\n") if line.startswith("import time:")}
    assert code is None or done.returncode == code
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "alignkit.cli" in imports and "torch" not in imports
    assert seconds < 2
    assert list(tmp_path.iterdir()) == []


# ---- help and mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_the_usage_names_every_verb(words: list[str], cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli(*words) == (0, f"{USAGE}\n", "")
    assert all(f"  alignkit {verb}" in USAGE for verb in VERBS)


def test_the_version(cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli("--version") == (0, f"{__version__}\n", "")


def test_an_unknown_verb(cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli("evalute") == (2, "", "error: 'evalute' is not a command. Did you mean 'evaluate'?\n")
    code, _, err = cli("+algo=esrl")  # the verb left out
    assert code == 2
    assert (
        err
        == "error: '+algo=esrl' is not a command. There is: claim, compare, completion, diff, doctor, evaluate, explain, from-trl, list, "
        "report, show, table, train, verify-resume.\n"
    )


@pytest.mark.parametrize("words", [[], ["data=rnnlg"], ["-m", "seed=1,2"]])
def test_train_without_a_method_lists_what_there_is(words: list[str], cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("train", *words)
    assert code == 2
    assert err == "error: train: name a method with +algo=NAME or a preset with +preset=NAME.\n"
    assert all(f"+{group}={name}" in out for group in ("algo", "preset") for name in names(group))


# ---- list and show -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_list_describes(group: str, name: str) -> None:
    word = f"{'+' if group in ('algo', 'preset') else ''}{group}={name}"
    found = [line.split(maxsplit=1) for line in catalog.listing().split("\n") if line.split(maxsplit=1)[:1] == [word]]
    assert len(found) == 1
    assert len(found[0]) == 2, "no description"


def test_methods_are_listed_by_stage() -> None:
    lines = catalog.listing().split("\n")
    for name in names("algo"):
        above = [line for line in lines[: next(i for i, x in enumerate(lines) if f"+algo={name} " in f"{x} ")]
                 if line.endswith(":") and not line.startswith(" ")]  # fmt: skip
        assert above[-1] == f"{composed([f'+algo={name}']).stage}:"


@pytest.mark.parametrize("name", CLASSES)
def test_the_card_of_a_method(name: str) -> None:
    """The docstring, every setting with its default as the class itself has them, and what the method brings."""
    given = content("algo", name)
    cls = get_class(given["algo"]["_target_"])
    lines = catalog.card(name).split("\n")
    assert lines[0] == f"{name}  (algo, stage {composed([f'+algo={name}']).stage})"
    assert lines[2] == (cls.__doc__ or "").split("\n")[0]
    parts = {k: v for k, v in given["algo"].items() if isinstance(v, dict) and "_target_" in v}
    for part, settings in parts.items():
        for field in dataclasses.fields(get_class(settings["_target_"])):
            line = next(x for x in lines if x.startswith(f"  {part}.{field.name}: "))
            assert f" = {settings.get(field.name, field.default)!r}" in line
    for field in dataclasses.fields(cls):
        if field.name in parts:
            continue
        line = next(x for x in lines if x.startswith(f"  {field.name}: "))
        default = given["algo"].get(field.name, field.default)
        assert default is dataclasses.MISSING or f" = {default!r}" in line
    for entry in given.get("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            assert f"{group.removeprefix('override ').lstrip('/').partition('@')[0]}={choice}" in next(
                x for x in lines if x.startswith("brings: ")
            )


@pytest.mark.parametrize("name", names("preset"))
def test_the_card_of_a_preset(name: str) -> None:
    card = catalog.card(name)
    assert card.startswith(f"{name}  (preset")
    assert (CONF / "preset" / f"{name}.yaml").read_text(encoding="utf-8").rstrip() in card
    assert any(line.startswith("# ") and "@package" not in line for line in card.split("\n")), "no idea"


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_the_example_of_a_card_can_be_run(group: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    verb, *words = shlex.split(catalog.card(name).rpartition("example: alignkit ")[2])
    if verb == "evaluate":
        words = evaluate_words([*words, "data=rnnlg"])
    check(composed(words))
    assert any(re.fullmatch(rf"\+?{group}(@[\w.]+)?={name}", word) for word in words)


def test_show_asks_for_one_name(cli: Callable[..., tuple[int, str, str]]) -> None:
    for words in ([], ["esrl", "sft"]):
        assert cli("show", *words)[0] == 2
    code, out, err = cli("show", "esrll")
    assert (code, out) == (2, "")
    assert "Did you mean 'esrl'?" in err


@pytest.mark.parametrize("part", ["critic=oracle", "prompt=pairwise"])
def test_a_part_that_a_method_does_not_have_is_refused(part: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli("train", "+algo=ppo", part)
    assert code == 2 and err.startswith(f"error: {part.partition('=')[0]}=…: this method takes no ")


# ---- evaluate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["data=rnnlg"], ["--cfg", "job"]])
def test_evaluate_asks_for_a_model(words: list[str], cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("evaluate", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: evaluate: name a run directory, a model folder,")


def test_evaluate_names_a_folder_that_is_not_there(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for words in (["nowhere"], ["nowhere", "data=rnnlg", "run.wandb=disabled"]):
        code, _, err = cli("evaluate", *words)
        assert code == 2
        assert "nowhere" in err.split("error: ")[1]
        assert "Traceback" not in err


def test_evaluate_takes_the_data_of_a_run(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    task = ["+algo=esrl", "data.limit=5", "+data.system=x", "algo.lr=1e-4", "seed=3"]
    record = {"hydra": {"runtime": {"choices": {"data": "rnnlg_acts", "model": "tiny"}}, "overrides": {"task": task}}}
    (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    own = ["data=rnnlg_acts", "data.limit=5", "+data.system=x"]
    start = ["+algo=evaluate", f"model.path={tmp_path}"]
    assert evaluate_words([str(tmp_path)]) == [*start, *own]
    assert evaluate_words([str(tmp_path), "evaluate.beams=5"]) == [*start, *own, "evaluate.beams=5"]
    assert evaluate_words([str(tmp_path), "data=rnnlg"]) == [*start, "data=rnnlg"]
    cfg = composed(evaluate_words([str(tmp_path)]))
    check(cfg)
    assert (cfg.stage, cfg.data.limit, cfg.data.system, cfg.data.unique) == ("evaluate", 5, "x", True)


def test_evaluate_needs_data_for_what_is_no_run() -> None:
    with pytest.raises(UserError, match="bundled:some is not a run, so name the data"):
        evaluate_words(["bundled:some"])
    assert evaluate_words(["bundled:some", "data=rnnlg"]) == ["+algo=evaluate", "model.path=bundled:some", "data=rnnlg"]


@pytest.mark.parametrize("path", ["runs/esrl-s0-1a2b3c4d", "my models/one", "one,two", "model (old)", "it's", "[one]"])
def test_evaluate_takes_any_path(path: str) -> None:
    """Commas, brackets and quotes mean something to Hydra; in a path they are part of the name."""
    assert composed(evaluate_words([path, "data=rnnlg"])).model.path == path


# ---- doctor --------------------------------------------------------------------------------------------------


def test_doctor_finds_a_sweeper_that_breaks_hydra(tmp_path: Path) -> None:
    for name in ("hydra_ax_sweeper", "hydra_nevergrad_sweeper"):
        folder = tmp_path / f"{name}-1.2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2.0\n")
    found, without = command("doctor", PYTHONPATH=str(tmp_path)), command("doctor")
    assert found.returncode == 1
    for name in ("hydra-ax-sweeper", "hydra-nevergrad-sweeper"):
        wrong = f"  - {name} 1.2.0 breaks every Hydra program on Python ≥ 3.11: pip uninstall {name}.\n"
        assert wrong in found.stdout
        assert name not in without.stdout


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``versions(torch="1.0", trl=None)``: what ``importlib.metadata`` says from now on."""
    real = importlib.metadata.version

    def put(**changed: str | None) -> None:
        said = {name.replace("_", "-"): version for name, version in changed.items()}

        def version(name: str) -> str:
            if name not in said:
                return real(name)
            if (found := said[name]) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return put


def test_doctor_reports_versions(versions: Callable[..., None]) -> None:
    report, before = catalog.doctor()
    for name in ("torch", "transformers", "hydra-core", "omegaconf", "datasets", "trl"):
        assert f"{name:<13} {importlib.metadata.version(name)}" in report.split("\n")
    versions(trl=None, omegaconf="2.2.3", transformers="5.17.0", datasets="10.0.1", sacrebleu="2.4.0rc1")
    report, wrong = catalog.doctor()
    assert "trl           missing" in report.split("\n")
    assert [line for line in wrong if line not in before] == [
        "omegaconf 2.2.3 is older than 2.3: pip install -U 'omegaconf>=2.3'.",
        "trl is not installed: pip install trl.",
    ]


def test_doctor_sees_a_driver_that_torch_cannot_use(
    versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    versions(torch="2.13.0+cpu")
    assert any("torch is a CPU build" in line for line in catalog.doctor()[1])
    versions(torch="2.13.0+cu128")
    assert not any("torch is a CPU build" in line for line in catalog.doctor()[1])


def test_doctor_says_where_wandb_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "wandb         key not set → offline" in catalog.doctor()[0]
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    report = catalog.doctor()[0]
    assert "wandb         key set → online" in report
    assert "a-secret" not in report
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "wandb         key set → disabled" in catalog.doctor()[0]


def test_doctor_sees_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    code, out, _ = cli("doctor")
    assert code == 1
    assert "\nwhat is wrong:\n" in out and "  - this folder cannot be written" in out


@pytest.mark.parametrize("kind", ["alignkit", "transformers", "policy"])
def test_evaluate_knows_a_reward_model(tmp_path: Path, kind: str) -> None:
    (tmp_path / "final").mkdir()
    names = ["LlamaForCausalLM" if kind == "policy" else "LlamaForSequenceClassification"]
    config = {"architectures": names, **({"id2label": {"0": "LABEL_0"}} if kind == "transformers" else {})}
    (tmp_path / "final" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if kind == "alignkit":
        (tmp_path / "final" / "reward_model.json").write_text("{}", encoding="utf-8")
    wanted = "evaluate" if kind == "policy" else "evaluate_rm"
    assert evaluate_words([str(tmp_path), "data=polite"])[0] == f"+algo={wanted}"
    assert "data.train=null" in evaluate_words([str(tmp_path), "data=pairs", "data.test=x.jsonl"])


def test_words_for_one_step_of_a_pipeline() -> None:
    cfg = composed(["+preset=rlhf_tiny", 'more.ppo="algo.steps=5"', 'more.rm=["algo.epochs=1","seed=3"]'])
    check(cfg)
    assert (cfg.more.ppo, list(cfg.more.rm)) == ("algo.steps=5", ["algo.epochs=1", "seed=3"])
    with pytest.raises(UserError, match=r"more\.pp: is not a step of this pipeline\. Did you mean 'ppo'"):
        check(composed(["+preset=rlhf_tiny", 'more.pp="algo.steps=5"']))
    with pytest.raises(UserError, match="a pipeline has no algo, data or reward of its own") as told:
        check(composed(["+preset=rlhf_tiny", "+algo.steps=5"]))
    assert "_target_" not in str(told.value)  # which would have one choose a method
