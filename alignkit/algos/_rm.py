"""What every method that trains a reward model brings to the loop: how the model reads, its data, its loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from alignkit import reward_model
from alignkit.algos._fit import Fit
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import need
from alignkit.heads import Head, Scalar


@dataclass(kw_only=True)
class RM(Fit):
    """Settings of a reward model and of its training."""

    batch_size: int = 32
    lr: float = 1e-4
    warmup: int = 10
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    head: Head = field(default_factory=Scalar)  # what stands on the backbone: see heads.py
    pooling: Literal["last", "eos", "mean", "all", "pattern"] = (
        "last"  # state that the head sees: of the last token, of an end token put there, mean, all (scores are summed), after a pattern
    )
    pattern: list[int] = field(default_factory=list)  # token ids of pooling=pattern, for which the last match counts
    template: str = "{prompt}"  # around a prompt that is text; saved with the model
    max_tokens: int | None = None  # of prompt and response: responses are cut at the end, then prompts at the beginning
    trained: Literal["all", "head"] = "all"  # head: the backbone stays as it is
    temperature: ClassVar[float] = 1.0  # margins are over it; a method that has one declares a setting of this name
    wants: ClassVar[str] = "pairs"  # or ratings: what there is to learn from

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_tokens >= 4")
        if "{prompt}" not in self.template:
            raise ValueError(f"template: {self.template!r} must hold {{prompt}}")

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Any:
        """The model that is trained."""
        reading = reward_model.Reading(
            head=self.head,
            template=self.template,
            pooling=self.pooling,
            temperature=self.temperature,
            pattern=list(self.pattern),
            max_tokens=self.max_tokens,
        )
        model = reward_model.build(cfg, reading, seed, texts, checkpoint)
        if self.trained == "head":
            model.model.backbone.requires_grad_(False)
            model.drop_dropout()  # the head learns from states as they will be
        return model

    def batch(self, model: Any, rows: list[Row]) -> Batch:
        """What a step learns from: pairs, the chosen response first."""
        return model.pairs(rows)
