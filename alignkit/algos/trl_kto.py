"""TRL's ``KTOTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.algos._trl import Offline, as_text, shuffled
from alignkit.algos.kto import KTO
from alignkit.data import Row
from alignkit.errors import UserError, need


@dataclass(kw_only=True)
class TrlKTO(Offline):
    """TRL's own KTOTrainer on alignkit's model and rows: a baseline for ``kto``.

    The chosen response of a pair is desirable, the other not, or ``data.desirable`` judges single ones. TRL reads rows in their
    order and takes the mismatched responses from the neighbours, so they are put into an order drawn from the seed.

    As shipped it trains a tiny model from scratch on bundled pairs, to see it run; yours are ``model=hf model.path=MODEL data=pairs
    data.train=FILE``.
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    desirable_weight: float = 1.0  # lambda_D
    undesirable_weight: float = 1.0  # lambda_U
    trainer: ClassVar[str] = "KTO"
    ours: ClassVar[dict[str, str]] = {
        "beta": "algo.beta", "desirable_weight": "algo.desirable_weight", "undesirable_weight": "algo.undesirable_weight",
    }  # fmt: skip
    logged: ClassVar[dict[str, str]] = {"kl": "reference_point"}
    wants_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "desirable_weight > 0", "undesirable_weight > 0")

    @property
    def ranks(self) -> KTO:
        """How held-out pairs are ranked."""
        return KTO(beta=self.beta)

    def per_step(self, sides: int) -> int:
        return self.batch_size * sides

    def arguments(self) -> dict[str, Any]:
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return super().arguments() | {"beta": self.beta, **weights}

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if len(sides) == 1 and "desirable" not in rows[0]:
            raise UserError(
                "trl_kto learns from responses that are judged: set data.chosen and data.rejected, or data.desirable=COLUMN."
            )
        return rows

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        judged = [
            (row, row[side], row["desirable"] if side == "response" else side == "chosen")
            for row in rows
            for side in (("response",) if "desirable" in row else ("chosen", "rejected"))
        ]
        found = []
        for row, text, good in shuffled(judged, seed):
            prompt, completion = as_text(reader, row, text)
            found.append({"prompt": prompt, "completion": completion, "label": good})
        return found
