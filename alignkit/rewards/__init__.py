"""Rewards: callables from a batch to scores. One class each, named in the YAML by ``_target_``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from alignkit import ranks
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.errors import UserError, suggest


class Reward(Protocol):
    """``(B,)`` float32, one score a response, or ``(B, T)``, what each token adds to it. The data row, with all its columns,
    is in ``batch.rows``."""

    def __call__(self, batch: Batch) -> Tensor: ...


def scores_of(reward: Reward, batch: Batch) -> Tensor:
    """What a reward gives to a batch: (B,) float32, on the batch's device. As ``judged``."""
    scores = judged(reward, batch).scores
    assert scores is not None
    return scores


def judged(reward: Reward, batch: Batch) -> Batch:
    """The batch with its ``scores``; of a reward a token also with ``extra["token_scores"]`` (B, T). A list of numbers will do.

    Of several ranks each judges some of the groups.

    Raises:
        UserError: another shape, or a score that is not finite; names the row.
    """
    own = ranks.groups(batch)
    parts = [part for part in ranks.each(lambda: None if own is None else _judge(reward, own)) if part is not None]
    scores = torch.cat([score for score, _ in parts])
    extra = batch.extra
    if parts[0][1] is not None:
        width = batch.mask.shape[1]  # of a rank's longest response there may be less
        tokens = torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for _, t in parts if t is not None])
        extra = {**extra, "token_scores": tokens.to(batch.mask.device)}
    return batch.with_(scores=scores.to(batch.mask.device), extra=extra)


def _judge(reward: Reward, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Scores (B,), and (B, T) of a reward a token."""
    found = reward(batch)
    if not isinstance(found, Tensor):
        try:
            found = torch.tensor([float(x) for x in found])
        except (TypeError, ValueError):
            raise UserError(f"the reward gave {type(found).__name__}; it must give one number a response.") from None
    tokens = None
    if found.dim() == 2 and found.shape == batch.mask.shape:
        tokens = (found.float() * batch.mask).to(batch.mask.device)
        found = tokens.sum(1)
    if found.shape != (len(batch),):
        raise UserError(f"the reward gave scores of shape {tuple(found.shape)} for {len(batch)} responses.")
    scores = found.float()
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the reward of row {batch.rows[bad[0]]['id']} is {float(scores[bad[0]])}, response {batch.responses[bad[0]]!r}."
        )
    return scores, tokens


def of_texts(rows: list[Row]) -> Batch:
    """Rows with a ``response`` as a batch for rewards that go by texts; one character stands for one token."""
    lengths = torch.tensor([max(1, len(row["response"])) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    one = torch.ones(len(rows), 1, dtype=torch.long)
    group = torch.zeros(len(rows), dtype=torch.long)
    return Batch(one, one.bool(), mask.long(), mask, group, rows, [row["response"] for row in rows])


def column_of(row: Row, column: str) -> object:
    """What a reward reads from a data row.

    Raises:
        UserError: the row has no such column.
    """
    if column not in row:
        raise UserError(
            f"row {row['id']} has no column '{column}', which the reward reads.{suggest(column, own_columns(row))} "
            f"Set reward.column, or choose another reward."
        )
    return row[column]


def own_columns(row: Row) -> Iterable[str]:
    return [name for name in row if name not in ("id", "prompt", "response", "references")]
