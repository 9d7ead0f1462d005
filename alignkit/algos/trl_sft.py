"""TRL's ``SFTTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignkit.algos._trl import Offline
from alignkit.data import Row
from alignkit.errors import UserError


@dataclass(kw_only=True)
class TrlSFT(Offline):
    """TRL's own SFTTrainer on alignkit's model and rows: a baseline for ``sft``.

    TRL is given the very tokens that ``sft`` learns, prompt tokens not trained; batches, packing, dropout and loss are its own.
    """

    lr: float = 5e-4
    warmup: int = 100
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    batch_size: int = 64
    trainer: ClassVar[str] = "SFT"

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if "desirable" in rows[0]:
            raise UserError(
                "data.desirable: trl_sft would learn the undesirable responses too; +algo=trl_kto reads it."
            )
        return rows

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        batch = reader.demonstrations(rows)
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
        answers = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.mask, strict=True)]
        return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(prompts, answers, strict=True)]
