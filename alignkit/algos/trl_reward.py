"""TRL's ``RewardTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from alignkit import reward_model
from alignkit.algos._trl import Offline, refuse_encoder_decoder
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import UserError


@dataclass(kw_only=True)
class TrlReward(Offline):
    """TRL's own RewardTrainer on alignkit's model and pairs: a baseline for ``bt``.

    A causal model with one linear head on the end-of-sequence token, as ``bt`` has it. TRL is given the very tokens that ``bt``
    reads; pairs longer than ``algo.trl.max_length`` it leaves out.
    """

    lr: float = 5e-4
    epochs: float = 6
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    weight_decay: float = 0.01
    trainer: ClassVar[str] = "Reward"
    logged: ClassVar[dict[str, str]] = {"accuracy": "preference_accuracy", "margin": "margin"}

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Any:
        refuse_encoder_decoder(cfg)
        if cfg.lora.r:
            raise UserError(
                "model.lora.r: trl_reward hands TRL a whole classifier, so all weights are trained; +algo=bt has LoRA."
            )
        return reward_model.build(cfg, reward_model.Reading(), seed, texts, checkpoint)

    def module(self, reader: Any) -> Any:
        classifier = reader._plain()
        if classifier is None:
            raise UserError(
                f"model: TRL needs a causal model of which transformers has a classifier with one linear head; "
                f"{reader.model.config.model_type} is none. +algo=bt trains it."
            )
        return classifier

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if len(sides) == 1:
            raise UserError("trl_reward learns from pairs: set data.chosen and data.rejected, or take data=polite.")
        return rows

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        prompts = reader.prompt_ids(rows)
        sides = {side: reader.encode_responses([row[side] for row in rows]) for side in ("chosen", "rejected")}
        return [{f"{side}_ids": p + ids[i] for side, ids in sides.items()} for i, p in enumerate(prompts)]
