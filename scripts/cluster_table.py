"""Memory and time of the paper-scale presets, as a dry run estimates them: the table of docs/howto/cluster.md.

    python scripts/cluster_table.py

writes it there anew. Models have their published shapes and no weights, so nothing is downloaded. Lengths and rows are assumptions,
printed with the numbers; a dry run on your own data measures them.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parent.parent))

from alignkit import dry_run, estimate, gpus, launch
from alignkit.cli import hydra_words
from alignkit.config import conf_dir, register
from alignkit.estimate import Held, Lengths
from alignkit.stages import pipeline

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "cluster.md"
BEGIN, END = "<!-- made by scripts/cluster_table.py -->\n", "<!-- end -->"
LLAMA = {"model_type": "llama", "vocab_size": 32000}
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "BART base": {"model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
                  "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12},
    "Transformer": {"model_type": "m2m_100", "vocab_size": 10000, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6,
                    "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}  # fmt: skip
SRT = {  # step → rows, and tokens: mean prompt, mean response, longest prompt, longest row
    "collect": (25_000, Lengths(150, 300, 1024, 2048)), "sft": (22_000, Lengths(150, 900, 1024, 4096)),
    "self": (75_000, Lengths(150, 300, 1024, 2048)), "dpo": (63_000, Lengths(150, 350, 1024, 3072)),
}  # fmt: skip
LORA = ["model.lora.r=16", "model.dtype=bfloat16", "model.compute=same"]  # ours, not the papers'
EIGHT = ["run.processes=8", "run.shard=true", "run.offload=true", "model.gradient_checkpointing=true"]  # ours, too
CASES: list[tuple[Any, ...]] = [  # preset, step of a pipeline, shape, rows, tokens, further words
    ("esrl_iwslt", "sft", "Transformer", 206_000, Lengths(30, 30, 128, 256)),
    ("esrl_iwslt", "esrl", "Transformer", 206_000, Lengths(30, 30, 128, 256)),
    ("esrl_cnndm", "sft", "BART base", 287_000, Lengths(700, 75, 1000, 1140)),
    ("esrl_cnndm", "esrl", "BART base", 287_000, Lengths(700, 75, 1000, 1140)),
    ("esrl_ppo_llama", "", "7B", 0, Lengths(300, 256, 768, 1024)),
    ("pcrm_alpaca_len", "", "7B", 9_700, Lengths(100, 100, 384, 512)),
    ("pcrm_alpaca_len", "", "7B", 9_700, Lengths(100, 100, 384, 512), *LORA),
    ("pcrm_alpaca_len", "", "7B", 9_700, Lengths(100, 100, 384, 512), *EIGHT),
    ("pcrm_tldr_len", "", "7B", 93_000, Lengths(400, 40, 900, 1024)),
    ("pcrm_dpo_len", "", "7B", 9_700, Lengths(100, 100, 384, 512)),
    ("pcrm_dpo_len", "", "7B", 9_700, Lengths(100, 100, 384, 512), *EIGHT),
    ("pcrm_ppo_alpaca", "", "7B", 0, Lengths(100, 384, 256, 640)),
    ("pcrm_ppo_alpaca", "", "7B", 0, Lengths(100, 384, 256, 640), *LORA, "reward.dtype=bfloat16"),
    ("pcrm_ppo_alpaca", "", "7B", 0, Lengths(100, 384, 256, 640), *EIGHT),
    ("pcrm_ppo_tldr", "", "7B", 0, Lengths(400, 256, 768, 1024)),
    *((f"srt_tulu2_{size.lower()}", step, "7B" if step == "collect" else size, *SRT[step]) for size in ("7B", "13B", "70B")
      for step in SRT if size == "7B" or step != "collect"),
    *((f"srt_tulu2_{size.lower()}", step, size, *SRT[step], *EIGHT) for size in ("7B", "13B") for step in ("sft", "dpo")),
]  # fmt: skip


@cache
def composed(*words: str) -> DictConfig:
    """What ``alignkit train WORDS`` composes; what the words leave open is no matter here."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", hydra_words([*words]))
        open_ = OmegaConf.missing_keys(cfg)
        return cfg if not open_ else compose("config", hydra_words([*words, *(f"{key}=given" for key in open_)]))


def estimated(
    preset: str, step: str, shape: str, rows: int, lengths: Lengths, *words: str
) -> tuple[dict[str, float], gpus.Work]:
    """(bytes by phase, work) of one training."""
    os.environ.setdefault("OPENAI_API_KEY", "none")  # no request is sent
    cfg = composed(f"+preset={preset}", *([] if step else words))
    if step:
        cfg = composed(*pipeline.steps(cfg)[step], *words)
    algo = launch._build(cfg.algo, "algo")
    model: Any = OmegaConf.to_object(cfg.model)
    model.path, model.config, model.device, model.tokenizer = None, SHAPES[shape], "meta", "bundled:translation"
    reader = dry_run._build_reader(cfg, model, algo, [])
    more = estimate.beside(cfg, algo, reader)
    if str(cfg.reward.get("_target_", "")).endswith(".Learned"):
        size = sum(p.numel() for p in reader.model.parameters())
        more.append(Held("reward model", size, 0, estimate.BYTES[cfg.reward.get("dtype", "float32")]))
    sides = 2 if cfg.stage in ("pref", "rm") else 1
    work = estimate.work_of(cfg, algo, reader, more, lengths, rows, sides)
    assert work is not None
    return estimate.most_of(estimate.needs(cfg, algo, reader, more, lengths, sides)), work


def table() -> str:
    """Markdown: a line a training."""
    lines = [
        "| preset, step | model | rows | tokens: prompt + response (longest row) | memory by phase, GB | "
        + " | ".join(gpu.name for gpu in gpus.GPUS)
        + " |",
        "|---" * (5 + len(gpus.GPUS)) + "|",
    ]
    for preset, step, shape, rows, lengths, *words in CASES:
        phases, work = estimated(preset, step, shape, rows, lengths, *words)
        need = ", ".join(f"{name} {amount / 1e9:,.0f}" for name, amount in phases.items())
        cells = []
        for gpu in gpus.GPUS:
            hours = dry_run._clock(work.seconds(gpu))
            cells.append(hours if all(map(gpu.holds, phases.values())) else f"({hours})")
        tokens = f"{lengths.prompt:.0f} + {lengths.response:.0f} ({lengths.longest})"
        name = (
            f"`{preset}`"
            + (f", {step}" if step else "")
            + (", LoRA" if LORA[0] in words else ", 8 GPUs" if words else "")
        )
        lines.append(
            f"| {name} | {shape} | {f'{rows:,}' if rows else 'any'} | {tokens} | {need} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with the table as it is now.

    Raises:
        ValueError: the marks between which it stands are not there.
    """
    if text.count(BEGIN) != 1 or END not in text:
        raise ValueError(f"{PAGE}: put the table between {BEGIN.strip()} and {END}")
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*?(?={END})", lambda _: f"\n{table()}\n", text)


if __name__ == "__main__":
    register()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
