"""Settings that were given and that nothing read are said; of settings that a run does read nothing is."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, command, composed, train

from alignkit.algos.grpo import GRPO
from alignkit.catalog import options, read
from alignkit.config import Evaluate, conf_dir
from alignkit.errors import need
from alignkit.origins import flat
from alignkit.report.collect import collect
from alignkit.report.content import of_runs
from alignkit.report.collect import configurations
from alignkit.unread import Watch, built_of

Cli = Callable[..., tuple[int, str, str]]
SAYS = "warning: these settings were given, but nothing in this run read them: "
QUICK = ["run.threads=1", "run.wandb=disabled", "evaluate.rows=6", "evaluate.bootstrap=20"]
CLASSIFIER = [
    "model=tiny_classifier", "model.vocab_size=300", "model.config.hidden_size=16", "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2",
]  # fmt: skip


def unread(err: str) -> list[str]:
    """What the one warning lists."""
    found = [line.removeprefix(SAYS).rstrip(".") for line in err.split("\n") if line.startswith(SAYS)]
    assert len(found) <= 1
    return found[0].split(", ") if found else []


# ---- no false alarm --------------------------------------------------------------------------------------------

TINY = {  # stage → words of a run of seconds
    "sft": [*SMALL_CAUSAL, "data.limit=24", "algo.steps=2", "algo.batch_size=4"],
    "pref": [*SMALL_CAUSAL, "data.limit=24", "algo.steps=2", "algo.batch_size=4"],
    "rm": ["data.limit=24", "algo.steps=2", "algo.batch_size=4"],
    "rl": ["algo.steps=2", "algo.prompts_per_step=4", "algo.max_new_tokens=6", "evaluate.max_new_tokens=6"],
    "distill": [*CLASSIFIER, "data=brackets", "data.limit=48", "algo.steps=2", "algo.batch_size=8"],
    "select": [*CLASSIFIER, "data=brackets", "data.limit=48", "algo.steps=2", "algo.batch_size=8", "algo.phases=2"],
    "refine": ["data.limit=8"],
    "evaluate": ["model=tiny_causal"],
    "study": [],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run directories that other methods need: a teacher, a selector, a reward model, decoded outputs."""
    root = tmp_path_factory.mktemp("made")
    teacher = train(root, "+algo=finetune", *TINY["distill"], *QUICK)[1]
    selector = train(root, "+algo=constant_grid", *TINY["select"], "algo.grid=[[1,1,1,1]]", f"algo.teacher={teacher}", *QUICK)[1]
    reward = train(root, "+algo=bt", *TINY["rm"], *QUICK)[1]
    outputs = train(root, "+algo=evaluate", "data=rnnlg", "model.path=bundled:nlg", "evaluate.max_new_tokens=6", *QUICK)[1]
    return {"teacher": str(teacher), "selector": str(selector), "reward": str(reward), "outputs": str(outputs)}


def more_words(name: str, stage: str, made: dict[str, str]) -> list[str]:
    """What a method needs besides its tiny configuration."""
    if name == "on_policy_kd":
        return ["algo.teacher=bundled:translation", "evaluate.max_new_tokens=6"]
    if name == "sequence_kd":
        return ["algo.teacher=bundled:translation"] if "teacher" in str(read(options("algo")[name])) else []
    if name == "inverse_value":
        return ["algo.base=bundled:lists"]
    if name == "selected":
        return [f"algo.selector={made['selector']}", f"algo.teacher={made['teacher']}"]
    if name == "judge":
        return ["data=rnnlg", "reward=chrf", f"algo.outputs={{a: {made['outputs']}, b: {made['outputs']}}}"]
    if name == "ksm":
        return [f"algo.teacher={made['teacher']}", "algo.episodes=2", "algo.updates=2", "algo.hidden=8"]
    if name == "constant_grid":
        return [f"algo.teacher={made['teacher']}", "algo.grid=[[1,1,1,1]]"]
    if stage in ("distill", "select"):
        return [f"algo.teacher={made['teacher']}"] if name != "finetune" else []
    models = {"evaluate": "bundled:nlg", "evaluate_classes": made["teacher"], "evaluate_rm": made["reward"]}
    data = {"evaluate": "rnnlg", "evaluate_classes": "brackets", "evaluate_rm": "polite"}
    return [f"model.path={models[stage]}", f"data={data[stage]}"] if stage in models else []


def as_word(key: str, value: Any) -> str:
    """A word of the command line that gives a key this value."""
    return f"{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    return "{}" if value == {} else "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", sorted(options("algo")))
def test_what_a_method_ships_with_is_read(name: str, made: dict[str, str], cli: Cli, tmp_path: Path) -> None:
    """Every setting that the files of its default configuration set (method, data, reward, model) is given as a word."""
    stage = composed([f"+algo={name}"]).stage
    words = [f"+algo={name}", *TINY.get(stage, []), *more_words(name, stage, made), *QUICK]
    cfg = composed(words)
    shipped: dict[str, Any] = {}
    from hydra import initialize_config_dir
    from alignkit.cli import hydra_words
    from alignkit.origins import layers
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for layer in layers(hydra_words(words)):
            shipped |= {k: v for k, v in layer.values.items() if k.partition(".")[0] in ("algo", "data", "reward", "model", "evaluate")}
    given = [as_word(k, OmegaConf.to_container(cfg, resolve=True) and OmegaConf.select(cfg, k)) for k in shipped
             if "_target_" not in k and not isinstance(OmegaConf.select(cfg, k), DictConfig)]
    code, out, err = cli("train", *words, *given)
    print(name, unread(err))
    assert code == 0, err
