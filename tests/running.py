"""Run configurations from tests: in this process, or through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from alignkit.cli import hydra_words
from alignkit.config import conf_dir, register
from alignkit.launch import launch

# a model of a few thousand parameters on a few dozen rows: a step takes milliseconds
SMALL_SEQ2SEQ = [
    "model=tiny_seq2seq", "model.vocab_size=300", "model.config.d_model=16", "model.config.encoder_layers=1",
    "model.config.decoder_layers=1", "model.config.encoder_ffn_dim=32", "model.config.decoder_ffn_dim=32",
    "model.config.encoder_attention_heads=2", "model.config.decoder_attention_heads=2",
]  # fmt: skip
SMALL_CAUSAL = [
    "model=tiny_causal", "model.vocab_size=300", "model.config.hidden_size=16", "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
]  # fmt: skip
SMALL_RUN = [
    "data.limit=40", "evaluate.rows=12", "evaluate.max_new_tokens=8", "evaluate.bootstrap=50", "run.threads=1",
    "run.wandb=disabled",
]  # fmt: skip
SMALL_SFT = ["+algo=sft", "data=rnnlg", *SMALL_RUN, "algo.batch_size=8", "algo.steps=6"]
SMALL_RL = [*SMALL_RUN, "algo.prompts_per_step=4", "algo.max_new_tokens=8", "algo.steps=6"]


def composed(words: list[str]) -> DictConfig:
    """What ``alignkit train WORDS`` composes."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", hydra_words(words))


def train(root: Path, *words: str) -> tuple[dict[str, Any], Path]:
    """Run in this process; returns (result, run directory)."""
    cfg = composed([*words, f"run.root={root}"])
    return launch(cfg), Path(cfg.run.dir)


def command(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """``alignkit WORDS`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "alignkit", *words], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env},
        timeout=300, check=False,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def tokens(*lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of pairs of responses with these lengths, all of whose tokens differ: (N, 2, T) each."""
    width = max(max(pair) for pair in lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, :, None]
    return torch.arange(1, mask.numel() + 1).view(mask.shape) * mask, mask
