"""SRT, stage 1: learn to answer, to criticise the answer and to answer better, in one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit import losses
from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.critique import written
from alignkit.data import Row
from alignkit.errors import UserError, need, suggest
from alignkit.policy import Policy

COLUMNS = ("response", "feedback", "refinement")


@dataclass(kw_only=True)
class SRT(Fit):
    """SRT (arXiv 2406.07168), equation 1: likelihood of response, feedback and refinement as one response to the instruction.

    The rows are those that `+algo=srt_collect` writes (data.train=RUN). Prompt tokens are not trained; response, feedback,
    refinement and the markers between them are, and the end-of-sequence token, which follows the refinement alone. Equation 1
    is ``sequence_sum``; ``token_mean`` is what the authors' software does by default. Epochs 5, batch 32, rate 1e-5 with a
    cosine and 10 % warm-up are the paper's, for 7B to 70B; the defaults here are ours.
    """

    keep: Literal["full", "no_score", "no_suggestion", "no_weakness", "no_feedback", "refinement_only"] = (
        "full"  # what stays of the sequence (Table 6)
    )
    reduction: Literal["token_mean", "sequence_sum"] = (
        "token_mean"  # what the loss is a mean over: tokens, or sequences
    )
    max_response_tokens: int | None = None  # longer sequences are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "max_response_tokens >= 1")

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        """Rows whose response is the whole sequence."""
        return [{**row, "response": self._sequence(row)} for row in rows]

    def _sequence(self, row: Row) -> str:
        for name in COLUMNS:
            if not row.get(name):
                raise UserError(
                    f"training row {row['id']} has no '{name}', which srt learns.{suggest(name, row)} Give rows that "
                    f"+algo=srt_collect has written: data.train=RUN."
                )
        said = row["feedback"]
        parts = ("weaknesses", "suggestions", "score")
        if not isinstance(said, dict) or any(part not in said for part in parts):
            raise UserError(
                f"training row {row['id']}: 'feedback' must hold {', '.join(parts)}; is {str(said)[:80]!r}."
            )
        weaknesses, suggestions, score = (said[part] for part in parts)
        return written(row["response"], weaknesses, suggestions, score, row["refinement"], self.keep)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        unit = {"token_mean": "tokens", "sequence_sum": "sequences"}[self.reduction]
        return losses.nll(policy.forward(batch), batch.mask, unit)
