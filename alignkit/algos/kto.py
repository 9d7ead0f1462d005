"""KTO: what counts is whether a response by itself is desirable, judged from a reference point that all responses share."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.algos._pref import Pairs, Pref, Question
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.policy import Policy
from alignkit.scoring import by_parts


@dataclass(kw_only=True)
class KTO(Pref):
    """KTO (arXiv 2402.01306): each response by itself, desirable or not, from a reference point z that a step's responses share.

    lambda_D (1 - sigmoid(beta (h - z))) of a desirable response, lambda_U (1 - sigmoid(beta (z - h))) of an undesirable one; h
    its log pi/ref, z = max(0, mean log pi/ref of mismatched prompts and responses), no gradient through z. On pairs, of which
    the chosen one is desirable, or on single responses that ``data.desirable`` judges. Ours: the mismatched response is that of
    the next training row with another prompt, and z the mean over the whole step (TRL: responses rotated within a device's
    batch).
    """

    beta: float = 0.1  # how closely the policy is held to the start model
    desirable_weight: float = 1.0  # lambda_D
    undesirable_weight: float = 1.0  # lambda_U; lambda_D n_D / (lambda_U n_U) is best kept in [1, 4/3]

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "beta > 0", "desirable_weight > 0", "undesirable_weight > 0")

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        """With ``row["mismatched"]``: the responses of the next row that has another prompt, a property of the data set."""
        good = len(rows) if len(sides) == 2 else sum(row["desirable"] for row in rows)
        bad = len(rows) * len(sides) - good
        high, low = self.desirable_weight * good, self.undesirable_weight * bad
        if not low <= high <= 4 / 3 * low:
            print(
                f"warning: the training rows hold {good} desirable and {bad} undesirable responses; KTO wants "
                f"algo.desirable_weight * {good} / (algo.undesirable_weight * {bad}) between 1 and 4/3"
                + (f", it is {high / low:.3g}." if low else "."),
                file=sys.stderr,
            )
        prompts = [json.dumps(row["prompt"]) for row in rows]
        if len(set(prompts)) == 1:
            raise UserError(
                "data.train: every row has the same prompt; KTO's reference point needs two different ones."
            )
        others, other = [0] * len(rows), 0
        for i in reversed(range(2 * len(rows))):  # twice around: the last rows look on to the first ones
            i %= len(rows)
            after = (i + 1) % len(rows)
            other = after if prompts[after] != prompts[i] else other
            others[i] = other
        return [{**row, "mismatched": [rows[j][side] for side in sides]} for row, j in zip(rows, others, strict=True)]

    def questions(self) -> list[Question]:
        return [Question("mismatched_ref_logprob", self.mismatched)]

    def mismatched(self, policy: Policy, batch: Batch) -> Tensor:
        """(B,) log-probabilities of each prompt's mismatched responses, as many as it has of its own."""
        size = 1 if "desirable" in batch.extra else 2
        texts = [text for row in batch.rows[::size] for text in row["mismatched"]]
        return by_parts(
            policy.answered(batch, texts, self.max_response_tokens, self.end), self.micro_tokens, policy.forward
        ).sum(1)

    def whole(self, policy: Policy, batch: Batch, generator: torch.Generator) -> Batch:
        """With ``extra["reference_point"]`` (B,): z of the step, in every row."""
        log_ratios = self.mismatched(policy, batch) - batch.extra["mismatched_ref_logprob"]
        z = log_ratios.mean().clamp(min=0)
        return batch.with_(extra={**batch.extra, "reference_point": z.expand(len(batch))})

    def margins(self, pairs: Pairs) -> Tensor:
        """The reference point is the same on both sides of a pair; of a single response it is taken as 0, the start model."""
        return self.beta * (pairs.signs * pairs.log_ratios).sum(1)

    def pair_losses(self, pairs: Pairs) -> Tensor:
        signs = pairs.signs
        weights = signs.clamp(min=0) * self.desirable_weight - signs.clamp(max=0) * self.undesirable_weight
        above = pairs.log_ratios - pairs.extra["reference_point"]
        # 1 - sigmoid(x) = sigmoid(-x), without loss of digits where sigmoid(x) is almost 1
        return (weights * (-self.beta * signs * above).sigmoid()).mean(1)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        return {"reference_point": float(pairs.extra["reference_point"].mean())}
