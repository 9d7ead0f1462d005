"""The words of a short run of every method that resumes, found by listing ``conf/algo``."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from critical import PROMPTS, critical_policy
from omegaconf import OmegaConf
from running import SMALL_CAUSAL, SMALL_RL, SMALL_RUN, SMALL_SEQ2SEQ, SMALL_SFT, train

from alignkit.config import conf_dir

MEASURES = ("evaluate", "evaluate_rm", "evaluate_classes")  # nothing to resume
METHODS = sorted(
    p.stem for p in (conf_dir() / "algo").glob("*.yaml") if not p.stem.startswith("_") and p.stem not in MEASURES
)
SHORT = [w for w in SMALL_RUN if not w.startswith("evaluate.bootstrap")]  # a few rows; verify-resume shortens the rest
STUDENT = [
    *SHORT, "algo.batch_size=8", "model.config.hidden_size=16", "model.config.num_hidden_layers=1", "model.config.intermediate_size=32",
    "model.config.num_attention_heads=2",
]  # fmt: skip
ENCODER = [*SHORT, "algo.batch_size=8", *(f"model.config.{k}" for k in ("hidden_size=16", "num_hidden_layers=1", "intermediate_size=32"))]  # fmt: skip
PREF = [*SHORT, *SMALL_CAUSAL, "algo.batch_size=8", "algo.max_response_tokens=24"]
GRID = "algo.grid=[[1,0,0,0],[1,1,0,0]]"
REFINE = ["run.threads=1", "algo.max_new_tokens=16"]
TRL = [*SMALL_RL, *SMALL_CAUSAL, "reward=length", "algo.k=4"]
OWN = {
    "trl_grpo": TRL,
    "trl_rloo": TRL,
    "rm_regression": [*SHORT, "algo.batch_size=8"],
    "pairwise_rm": [*SHORT, *SMALL_CAUSAL, "algo.batch_size=8"],
    "sft": [*SHORT, *SMALL_SEQ2SEQ, "data=rnnlg", "algo.batch_size=8"],
    "srt": [*SHORT, *SMALL_CAUSAL, "algo.batch_size=4", "data.train={criticised}", "data.test={criticised}", "evaluate.protocol=plain"],
    "inverse_value": [*SHORT, *SMALL_CAUSAL, "data=rnnlg", "algo.batch_size=8", "algo.base={base}"],
    "finetune": STUDENT,
    "on_policy_kd": [*SHORT, "algo.batch_size=4", "algo.teacher=bundled:translation", "model.layers=1"],
    "selected": [*STUDENT, "algo.teacher={teacher}", "algo.selector={selector}"],
    "constant_grid": [*STUDENT, "algo.teacher={teacher}", GRID],
    "ndr": ["algo.prompts=20", "algo.models=4", "algo.resamples=20"],
    "sampling_memory": ["algo.lengths=[4,200]"],
    "judge": ["data=lists", "reward=list_score", "algo.outputs={{a: {answers}, b: {answers}}}", "evaluate.rows=8"],
    "srt_self": ["run.threads=1", "model.path={critical}", "data.train={prompts}"],
}  # fmt: skip
STAGES = {
    "rl": [*SMALL_RL, *SMALL_CAUSAL],
    "pref": PREF,
    "rm": ENCODER,
    "refine": REFINE,
    "trl": [*SHORT, *SMALL_CAUSAL, "algo.batch_size=8"],
}


def verified(*words: str) -> subprocess.CompletedProcess[str]:
    """``alignkit verify-resume WORDS``: five processes, which a busy machine may take minutes to start."""
    command = [sys.executable, "-m", "alignkit", "verify-resume", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


def stage_of(name: str) -> str:
    cfg = OmegaConf.load(conf_dir() / "algo" / f"{name}.yaml")
    below = [d for d in cfg.get("defaults", []) if isinstance(d, str) and d.startswith("_") and d != "_self_"]
    return str(cfg.get("stage") or stage_of(below[0]))


def words_of(name: str, made: Path) -> list[str]:
    """The words of method ``name``; runs that it starts from are made below ``made`` first."""
    words = OWN.get(name) or STAGES.get(stage_of(name)) or [*STUDENT, "algo.teacher={teacher}"]
    return [f"+algo={name}", *(_filled(w, made) for w in words if not w.startswith("algo.steps="))]


def _filled(word: str, made: Path) -> str:
    for key, make in (
        ("base", _base),
        ("teacher", _teacher),
        ("selector", _selector),
        ("answers", _answers),
        ("criticised", _criticised),
        ("critical", _critical),
        ("prompts", _prompts),
    ):
        if f"{{{key}}}" in word:
            word = word.replace(f"{{{key}}}", str(make(made)))
    return word.replace("{{", "{").replace("}}", "}")


@cache
def _base(made: Path) -> Path:
    return train(made, *SMALL_SFT, *SMALL_CAUSAL, "algo.steps=2")[1]


@cache
def _teacher(made: Path) -> Path:
    return train(made, "+algo=finetune", *STUDENT, "algo.steps=2", "algo.warmup=0")[1]


@cache
def _selector(made: Path) -> Path:
    words = [*STUDENT, f"algo.teacher={_teacher(made)}", GRID, "algo.steps=2", "algo.phases=1", "algo.warmup=0"]
    return train(made, "+algo=constant_grid", *words)[1]


@cache
def _criticised(made: Path) -> Path:
    return train(made, "+algo=srt_collect", "data.limit=8", "run.wandb=disabled", *REFINE)[1]


@cache
def _critical(made: Path) -> Path:
    critical_policy().save(made / "critical")
    return made / "critical"


@cache
def _prompts(made: Path) -> Path:
    """Enough rows for four parts: the dialogues that the model knows, again and again."""
    rows = [{"prompt": prompt, "response": "1"} for prompt in PROMPTS * 8]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made / "prompts.jsonl"


@cache
def _answers(made: Path) -> Path:
    words = ["+algo=evaluate", "data=lists", "model=tiny_lists", *SHORT, "evaluate.rows=8"]
    return train(made, *words)[1] / "outputs-test.jsonl"
