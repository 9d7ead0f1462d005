"""TRL's ``DPOTrainer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.algos._trl import Offline, as_text
from alignkit.algos.dpo import DPO
from alignkit.data import Row
from alignkit.errors import UserError, need


@dataclass(kw_only=True)
class TrlDPO(Offline):
    """TRL's own DPOTrainer on alignkit's model and pairs: a baseline for ``dpo``.

    ``algo.trl.loss_type=[ipo]`` and the like choose its other losses. Held-out pairs are ranked by alignkit's own ``dpo``.

    As shipped it trains a tiny model from scratch on bundled pairs, to see it run; yours are ``model=hf model.path=MODEL data=pairs
    data.train=FILE``.
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    trainer: ClassVar[str] = "DPO"
    ours: ClassVar[dict[str, str]] = {"beta": "algo.beta"}
    logged: ClassVar[dict[str, str]] = {"rewards/margins": "margin"}
    wants_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0")

    @property
    def ranks(self) -> DPO:
        """How held-out pairs are ranked."""
        return DPO(beta=self.beta)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"beta": self.beta}

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if len(sides) == 1:
            raise UserError("trl_dpo learns from pairs: set data.chosen and data.rejected, or take data=polite.")
        return rows

    def dataset(self, reader: Any, rows: list[Row], seed: int) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            (prompt, chosen), (_, rejected) = (as_text(reader, row, row[side]) for side in ("chosen", "rejected"))
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return found
