"""On-policy distillation: the teacher corrects what the student writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from alignkit import losses
from alignkit.algos._distill import Distill
from alignkit.batch import Batch, Loss
from alignkit.decode import Decode
from alignkit.errors import need


@dataclass(kw_only=True)
class OnPolicyKD(Distill):
    """Generalised knowledge distillation (GKD, arXiv 2306.13649): in a share of the steps the student writes the responses
    itself, in the others they are the data's; at each of their tokens it is drawn to the teacher's distribution by the
    generalised Jensen-Shannon divergence, without a gradient through sampling.

    ``beta`` 0 is KL(p_T ‖ p_S), 1 is KL(p_S ‖ p_T), as their limits in the paper.
    """

    task: Literal["classify", "write"] = "write"
    share: float = 1.0  # lambda: steps whose responses the student writes; 1: the rows need none
    beta: float = 0.5
    temperature: float = 1.0  # of both sides in the loss
    sampling_temperature: float = 1.0
    max_new_tokens: int = 64
    uses: ClassVar[tuple[bool, bool, bool, bool]] = (False, True, False, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            self, "share >= 0", "share <= 1", "beta >= 0", "beta <= 1", "sampling_temperature > 0", "max_new_tokens >= 1"
        )  # fmt: skip
        if self.task == "classify":
            raise ValueError("task: a classifier writes nothing; +algo=kd distils one")
        if self.cache_gb and self.share:
            raise ValueError(
                "cache_gb: the teacher reads what is written at each step, so there is nothing to keep; set 0"
            )

    def collate(self, student: Any) -> Any:
        """Rows → batch, for the loop; rows without a response are for the student to answer."""
        blank = "" if self.share == 1 else None
        return lambda rows: student.demonstrations(
            [{**row, "response": blank if row["response"] is None else row["response"]} for row in rows],
            self.max_tokens,
        )

    def whole(self, student: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """With the student's own responses, in a share of the steps."""
        if float(torch.rand((), generator=generator)) >= self.share:
            return batch
        with self._run.phase("sample"):
            tau = torch.full((len(batch),), self.sampling_temperature)
            how = Decode(max_new_tokens=self.max_new_tokens)
            drawn: Batch = student.generate(batch.rows, 1, how, temperature=tau, generator=generator)
        self._run.count("samples", len(drawn))
        self._run.count("tokens/sampled", float(drawn.mask.sum()))
        return drawn.with_(logprobs=None)

    def loss(self, student: Any, batch: Batch) -> Loss:
        assert self._teacher is not None
        found = losses.jensen_shannon(
            student.seen(batch).logits, self._teacher.seen(batch).logits, self.beta, self.temperature
        )
        count = float(batch.mask.sum())
        return Loss(found.sum(), count, {"divergence": float(found.detach().mean())})
