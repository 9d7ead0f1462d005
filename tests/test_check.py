"""What ``check`` and the command line refuse before anything is loaded, and how they say it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from running import command, composed

from alignkit.cli import hydra_words
from alignkit.config import check
from alignkit.errors import UserError


def refused(*words: str) -> dict[str, str]:
    """Key → what ``check`` says of it."""
    with pytest.raises(UserError) as caught:
        check(composed([*words]))
    first, *lines = str(caught.value).split("\n")
    assert first == "the configuration cannot be run:"
    assert all(line.startswith("  - ") for line in lines)
    return dict(line.removeprefix("  - ").split(": ", 1) for line in lines)


def imported(process: subprocess.CompletedProcess[str]) -> set[str]:
    """Modules that a process run with PYTHONPROFILEIMPORTTIME imported."""
    lines = [line for line in process.stderr.split("\n") if line.startswith("import time:")]
    found = {line.rpartition("|")[2].strip() for line in lines}
    assert "alignkit.cli" in found
    return found


def message(process: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in process.stderr.split("\n") if not line.startswith("import time:")).strip()


# ---- keys and types ------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = refused(
        "+algo=esrl", "algo.stepps=3", "algo.lr=fast", "algo.k_min=1.5", "algo.standardize=1", "algo.baseline=median",
        "algo.betas=0.9", "data.limt=3", "data.prompt=7", "data.chat=null", "data.dev=???", "reward.weights=1",
        "reward.rewards.bleu.smoth=exp", "reward.rewards.slots.column=3", "evaluate.decode=gready", "evaluate.beams=0",
        "run.keep=0", "run.processes=0", "run.patience=0", "run.shard=true", "run.wandb=on", "model.kind=decoder", "model.dtype=float8",
    )  # fmt: skip
    assert said == {
        "algo.stepps": "unknown. Did you mean 'steps'?",
        "algo.lr": "must be float, is 'fast'.",
        "algo.k_min": "must be int, is 1.5.",
        "algo.standardize": "must be bool, is 1.",
        "algo.baseline": "must be Literal['none', 'fifo', 'batch', 'leave_one_out'], is 'median'.",
        "algo.betas": "must be tuple[float, float], is 0.9.",
        "data.limt": "unknown. Did you mean 'limit'?",
        "data.prompt": "must be str, is 7.",
        "data.chat": "must be bool, is None.",
        "data.dev": "must be given.",
        "reward.weights": "must be dict[str, float], is 1.",
        "reward.rewards.bleu.smoth": "unknown. Did you mean 'smooth'?",
        "reward.rewards.slots.column": "must be str, is 3.",
        "evaluate.decode": "must be one of greedy, beam, sample; is 'gready'.",
        "evaluate.beams": "must be at least 1.",
        "run.keep": "must be at least 1.",
        "run.processes": "must be at least 1.",
        "run.patience": "must be more than 0 seconds, or null to wait for ever.",
        "run.shard": "one process has all layers. Start several with run.processes=N, torchrun or accelerate launch.",
        "run.wandb": "must be one of auto, online, offline, disabled; is 'on'.",
        "model.kind": "must be one of auto, causal, seq2seq, encoder; is 'decoder'.",
        "model.dtype": "must be one of float32, bfloat16, float16; is 'float8'.",
    }


def test_a_key_like_no_other_gets_the_list() -> None:
    assert refused("+algo=sft", "reward=length", "reward.zzz=1") == {"reward.zzz": "unknown. There is: target, unit."}


def test_a_required_setting_must_be_given() -> None:
    assert refused("+algo=esrl", "~reward.weights") == {"reward.weights": "must be given."}


def test_a_model_must_be_named() -> None:
    for words in (["model=hf"], ["model.path=null"]):
        assert [key.split(".")[0] for key in refused("+algo=sft", *words)] == ["model"]
    check(composed(["+algo=sft", "model=tiny_causal"]))


def test_settings_of_the_base_class_are_known() -> None:
    """ESRL itself names neither ``steps`` nor ``schedule``: they come from ``RL``."""
    check(composed(["+algo=esrl", "algo.steps=3", "algo.schedule=cosine", "algo.lr=1", "algo.betas=[0.9,0.99]"]))


WRITTEN = '''
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class Typed:
    """Every form of annotation."""

    whole: int = 1
    number: float = 1.0
    text: str = ""
    switch: bool = False
    perhaps: int | None = None
    either: str | list[str] = ""
    choice: Literal["a", "b"] = "a"
    size: Literal[1, 2] = 1
    only: Literal["x"] = "x"
    texts: list[str] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    table: dict[str, float] = field(default_factory=dict)
    part: Any = None


class Initialised:
    def __init__(self, width: int, depth: int = 2, *, name: str = "") -> None: ...


class Open:
    def __init__(self, width: int = 1, **settings: object) -> None: ...


def function(width, depth=2): ...
'''


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``target(CLASS, **settings)`` checks a module that the user wrote; returns what is said, or nothing."""
    module = f"written_{tmp_path.name}"  # a new one each time: sources that were read are remembered
    (tmp_path / f"{module}.py").write_text(WRITTEN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = composed(["+algo=sft"])

    def run(written: str, **settings: Any) -> dict[str, str]:
        cfg.reward = {"_target_": f"{module}.{written}", **settings}
        try:
            check(cfg)
        except UserError as e:
            return dict(line.removeprefix("  - reward.").split(": ", 1) for line in str(e).split("\n")[1:])
        return {}

    return run


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("whole", [3, -1, 0], [3.0, 1.5, True, "3", None, [3]]),
        ("number", [1.5, 1, 1e-4], [True, "1.5", None, [1.0]]),
        ("text", ["a", ""], [1, True, None, ["a"]]),
        ("switch", [True, False], [1, 0, "true", None]),
        ("perhaps", [None, 3], [3.5, "None", True]),
        ("either", ["a", ["a", "b"]], [1, {"a": 1}, None]),
        ("choice", ["a", "b"], ["c", "", 1, None, ["a"]]),
        ("size", [1, 2], [3, "1", None]),
        ("only", ["x"], ["y", None]),
        ("texts", [["a"], []], ["a", 1, {"a": 1}, None]),
        ("pair", [[0.9, 0.99]], [0.9, "0.9", {"a": 1}]),
        ("table", [{"a": 1.0}, {}], [["a"], 1, "a"]),
        ("part", [None, 1, "a", [1], {"a": 1}], []),
    ],
)
def test_types(key: str, good: list[Any], bad: list[Any], target: Any) -> None:
    assert [value for value in good if target("Typed", **{key: value})] == []
    assert [value for value in bad if key not in target("Typed", **{key: value})] == []


def test_parameters_of_a_constructor(target: Any) -> None:
    assert target("Initialised", width=1, name="x") == {}
    assert target("Initialised", depth="deep", nmae="x") == {
        "width": "must be given.",
        "depth": "must be int, is 'deep'.",
        "nmae": "unknown. Did you mean 'name'?",
    }


def test_parameters_of_a_function(target: Any) -> None:
    assert target("function", width=1) == {}
    assert target("function", dept=1) == {"width": "must be given.", "dept": "unknown. Did you mean 'depth'?"}


def test_a_class_that_takes_any_keyword(target: Any) -> None:
    assert target("Open", width=1, anything="x") == {}


def test_a_wrong_part_inside_a_list_is_named(target: Any) -> None:
    part = {"_target_": "alignkit.rewards.rule.Length", "target": "long"}
    assert target("Typed", part=[{"a": 1}, part]) == {"part[1].target": "must be int, is 'long'."}


# ---- targets and stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("alignkit.algos.esrll.ESRL", "no module 'alignkit.algos.esrll'"),
        ("nowhere.at.all.ESRL", "no module 'nowhere'"),
        ("alignkit.algos.esrl.ESLR", "module 'alignkit.algos.esrl' has no 'ESLR'"),
    ],
)
def test_an_unknown_target(given: str, says: str) -> None:
    said = refused("+algo=esrl", f"algo._target_={given}", "data.limt=3")
    assert said["algo._target_"].startswith(says)
    assert "data.limt" in said


def test_an_unknown_class_gets_a_suggestion() -> None:
    assert "Did you mean 'ESRL'?" in refused("+algo=esrl", "algo._target_=alignkit.algos.esrl.ESLR")["algo._target_"]


@pytest.mark.parametrize("given", ["3", "ESRL", "null"])
def test_a_target_that_is_no_path(given: str) -> None:
    """Said in the user's words, not in Python's."""
    said = refused("+algo=esrl", f"algo._target_={given}")["algo._target_"]
    assert "object has no attribute" not in said and "''" not in said


def test_a_part_of_a_mix_is_named() -> None:
    said = refused("+algo=esrl", "reward.rewards.slots._target_=alignkit.rewards.rules.Slots")
    assert said == {"reward.rewards.slots._target_": "no module 'alignkit.rewards.rules'"}


def test_a_node_without_a_target() -> None:
    assert list(refused("+algo=esrl", "~reward._target_")) == ["reward"]


def test_a_stage_gets_what_it_needs() -> None:
    assert refused("+algo=esrl", "~data", "~reward") == {
        "data": "the rl stage needs one; choose it with data=NAME (see `alignkit list`).",
        "reward": "the rl stage needs one; choose it with reward=NAME (see `alignkit list`).",
    }
    assert list(refused("+algo=sft", "~data")) == ["data"]
    assert list(refused("+algo=evaluate")) == ["data"]
    assert list(refused("stage=pipeline")) == ["steps"]


def test_null_takes_a_choice_back() -> None:
    """``reward=null`` is what one would write; Hydra itself knows only ``~reward``."""
    assert list(refused("+algo=esrl", "reward=null")) == ["reward"]
    assert composed(["+algo=sft", "reward=null"]).reward == {}


def test_an_unknown_stage() -> None:
    assert "Did you mean 'pipeline'?" in refused("+algo=esrl", "stage=pipelin")["stage"]
    assert "+algo=NAME" in refused("data=rnnlg")["stage"]


# ---- words that Hydra never sees -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model=tinny", "model=tinny: there is no such model. Did you mean 'tiny'?"),
        ("data=rnnlgs", "data=rnnlgs: there is no such data. Did you mean 'rnnlg'?"),
        ("reward=chrff", "reward=chrff: there is no such reward. Did you mean 'chrf'?"),
        ("+algo=esrll", "algo=esrll: there is no such algo. Did you mean 'esrl'?"),
        ("algo=esrl,reinforse", "algo=reinforse: there is no such algo. Did you mean 'reinforce'?"),
        ("sede=1", "sede: no such key. Did you mean 'seed'?"),
        ("++sede=1", "sede: no such key. Did you mean 'seed'?"),
        ("run.save_evry=3", "run.save_evry: no such key. Did you mean 'save_every'?"),
        ("+run.save_evry=3", "run.save_evry: no such key. Did you mean 'save_every'?"),
        ("evaluate.beam=2", "evaluate.beam: no such key. Did you mean 'beams'?"),
        ("model.devise=cpu", "model.devise: no such key. Did you mean 'device'?"),
        ("model.lora.alfa=4", "model.lora.alfa: no such key. Did you mean 'alpha'?"),
        ("evalute.beams=2", "evalute: no such key. Did you mean 'evaluate'?"),
    ],
)
def test_an_unknown_word(word: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        hydra_words(["+algo=sft", word] if "algo" not in word else [word])
    assert str(caught.value) == says


@pytest.mark.parametrize(
    "word",
    ["algo.new=1", "data.x.y=1", "model.config.hidden_size=3", "seed=1,2", "model.lora.r=4", "hydra.verbose=true",
     "hydra/launcher=joblib", "~reward", "steps.a=[x]", "reward=bleu,chrf", "data=choice(rnnlg,rnnlg_acts)"],
)  # fmt: skip
def test_words_that_are_left_to_others(word: str) -> None:
    """Open nodes are `check`'s, Hydra's own keys are Hydra's."""
    assert hydra_words(["+algo=sft", word]) == ["+algo=sft", word]


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algo.stepps=3", "data.limt=3"], ["algo.stepps: unknown.", "data.limt: unknown."]),
        (["algo._target_=alignkit.algos.esrl.ESLR"], ["has no 'ESLR'"]),
        (["data.train=missing.jsonl"], ["missing.jsonl: no such file."]),
        (["sede=1"], ["sede: no such key. Did you mean 'seed'?"]),
        (["seed=one"], ["seed", "'one'"]),
    ],
    ids=["settings", "class", "data", "key", "type"],
)
def test_a_mistake_ends_in_one_message(words: list[str], says: list[str], tmp_path: Path) -> None:
    """Exit code 2, no traceback, nothing left behind, and torch is not imported for it."""
    done = command("train", "+algo=esrl", *words, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    said = message(done)
    assert all(part in said for part in says)
    assert "Traceback" not in said and "HYDRA_FULL_ERROR" not in said
    assert "torch" not in imported(done)
    assert done.returncode == 2
    assert [p.name for p in (tmp_path / "runs").glob("*")] == []


def test_torch_would_be_seen() -> None:
    """The control of the test above: a process that imports torch is told apart."""
    done = subprocess.run(
        [sys.executable, "-c", "import alignkit.cli, alignkit.ops"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip
    assert "torch" in imported(done)


def test_check_does_not_change_the_configuration() -> None:
    cfg = composed(["+algo=esrl"])
    before = OmegaConf.to_yaml(cfg)
    check(cfg)
    assert OmegaConf.to_yaml(cfg) == before
