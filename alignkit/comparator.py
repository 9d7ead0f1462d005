"""A reward model that writes its verdict: which of two responses is better, by the next token after both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.policy import Policy
from alignkit.scoring import by_rows

SETTINGS = "reward_model.json"


class Comparator:
    """p(first is better) = sigmoid(log p(yes) - log p(no)) after a prompt that shows both responses (arXiv 2504.04950).

    Prompt and specification are ours, of the paper little more than the idea was at hand. Every comparison is made in both
    orders and averaged; a response's score is its comparison with an anchor, the row's first reference.
    """

    critic = beside = None  # as the supervised loop asks of a policy
    scalar = False  # scores depend on the anchor, so margins are not their differences
    mean, std = 0.0, 1.0

    def __init__(self, policy: Policy, template: str, yes: str, no: str) -> None:
        self.policy, self.template, self.yes, self.no = policy, template, yes, no
        self.examples: list[Row] = []
        encode = lambda text: policy.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        one, other = encode(yes), encode(no)
        shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if shared is None:
            raise UserError(f"algo.yes={yes!r} and algo.no={no!r} begin with the same tokens. Choose other words.")
        self.opening, self.verdicts = one[:shared], [one[shared], other[shared]]

    @property
    def model(self) -> Any:
        return self.policy.model

    @property
    def limit(self) -> int:
        return self.policy.max_positions

    # ---- what pipelines call -------------------------------------------------------------------------------------

    @torch.no_grad()
    def compare(self, rows: list[Row], budget: int = 8192) -> Tensor:
        """(N,) float64 probability that each row's ``chosen`` is better than its ``rejected``; exactly 1/2 for equal ones."""
        found = []
        for first in range(0, len(rows), 256):
            batch = self.pairs(rows[first : first + 256])
            with self.policy._evaluating():
                logits = by_rows(batch, budget, lambda part: self.logits(part).repeat_interleave(2))[0::2]
            p = torch.sigmoid(logits.double())
            found.append(0.5 + (p[0::2] - p[1::2]) / 2)  # exactly 1/2 where both orders are one
        return torch.cat(found)

    def score(self, rows: list[Row], budget: int = 8192) -> Tensor:
        """(N,) float32 in [0, 1]: how probably each row's ``response`` is better than its first reference.

        Raises:
            UserError: a row has no reference.
        """
        for row in rows:
            if not row.get("references"):
                raise UserError(
                    f"row {row['id']} has no reference to compare with, as this reward model does. Set data.references."
                )
        return self.compare(
            [{**row, "chosen": row["response"], "rejected": row["references"][0]} for row in rows], budget
        ).float()

    def rank(self, row: Row, responses: list[str], budget: int = 8192) -> list[int]:
        """Indices of the responses to a row's prompt, the best first: by their mean chance against all the others."""
        n = len(responses)
        duels = [(i, j) for i in range(n) for j in range(i + 1, n)]
        wins = torch.full((n, n), 0.5, dtype=torch.float64)
        if duels:
            p = self.compare([{**row, "chosen": responses[i], "rejected": responses[j]} for i, j in duels], budget)
            for (i, j), one in zip(duels, p.tolist(), strict=True):
                wins[i, j], wins[j, i] = one, 1 - one
        return torch.sort(wins.mean(1), descending=True, stable=True).indices.tolist()

    def token_scores(self, batch: Batch, budget: int = 8192) -> Tensor:
        """Raises UserError: a verdict is about whole responses."""
        raise UserError("a comparing reward model has no rewards of tokens. Take reward.per=response.")

    def ratings(self, rows: list[Row], budget: int = 8192) -> list[dict[str, float]]:
        """Raises UserError: it has none."""
        raise UserError("a comparing reward model gives no ratings. Train one with +algo=rm_regression.")

    def check(self) -> None:
        """It has no saved scores to check."""

    # ---- training ------------------------------------------------------------------------------------------------

    def pairs(self, rows: list[Row]) -> Batch:
        """N pairs → 4N rows: chosen before rejected and rejected before chosen, each followed by yes and by no."""
        asked: list[Row] = []
        for row in rows:
            for first, second in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
                text = self.template.format(prompt=_text(row["prompt"]), first=first, second=second)
                asked.append({"id": row.get("id"), "prompt": text, "references": []})
        policy = self.policy
        ids = policy.encode_prompts(asked)
        seq2seq = policy.is_encoder_decoder
        prompts = ids if seq2seq else [one + self.opening for one in ids]
        answers = [[*(self.opening if seq2seq else []), verdict] for verdict in self.verdicts]
        prompt_ids, prompt_mask = policy._pad([one for one in prompts for _ in answers], "right" if seq2seq else "left")
        response_ids, mask = policy._pad(answers * len(prompts), "right")
        group = torch.arange(len(rows), device=policy.device).repeat_interleave(4)
        return Batch(
            prompt_ids, prompt_mask, response_ids, mask, group, [row for row in rows for _ in range(4)],
            [self.yes, self.no] * len(prompts),
        )  # fmt: skip

    def logits(self, batch: Batch) -> Tensor:
        """(2N,) log p(yes) - log p(no) of the comparisons of a batch of N pairs."""
        logprobs = self.policy.forward(batch.with_(group=torch.arange(len(batch), device=batch.mask.device) // 2))[
            :, -1
        ]
        return logprobs[0::2] - logprobs[1::2]

    def too_long(self, rows: list[Row]) -> int:
        """None is cut: comparisons that do not fit are refused."""
        return 0

    # ---- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the language model, and what it is asked."""
        self.policy.save(path)
        settings = {"kind": "comparator", "template": self.template, "yes": self.yes, "no": self.no}
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint of this very model in place."""
        self.policy.restore(checkpoint)

    def export(self, path: Path) -> None:
        """Write the whole model, adapters merged into it."""
        if hasattr(self.policy.model, "merge_and_unload"):
            self.policy.model = self.policy.model.merge_and_unload()
        self.save(path)


def _text(prompt: Any) -> str:
    """A prompt as text: chat messages by their contents, one a paragraph."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
