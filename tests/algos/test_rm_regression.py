"""Regression on ratings: the masked mean squared error of helpsteer2.md, and what it says of its data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.algos.rm_regression import RMRegression
from alignkit.errors import UserError
from alignkit.heads import Attributes, Scalar

NAMES = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]


def algo() -> RMRegression:
    return RMRegression(head=Attributes(names=NAMES, weights=[0.65, 0.8, 0.45, 0, 0]))


def cost(make_batch, predicted: list[list[float]], rated: list[dict[str, Any]]) -> Any:
    z = torch.tensor(predicted, requires_grad=True)
    model = SimpleNamespace(outputs=lambda batch: (z, None), responses=lambda rows: make_batch([1] * len(rows)), z=z)
    batch = algo().batch(model, [{"id": i, "ratings": one} for i, one in enumerate(rated)])
    return algo().loss(model, batch), z


CARD = [3.1, 2.8, 3.5, 1.9, 2.2]


@pytest.mark.parametrize("missing", [{"coherence": None}, {}], ids=["null", "absent"])
def test_card_vector(make_batch, missing: dict[str, None]) -> None:
    """(.01 + .04 + .01 + .04) / 4 = .025; the coherence is not rated."""
    rated = {"helpfulness": 3, "correctness": 3.0, "complexity": 2, "verbosity": 2, **missing}
    loss, z = cost(make_batch, [CARD], [rated])
    assert float(loss.total.detach()) / loss.count == pytest.approx(0.025, abs=1e-6)
    assert loss.count == 4 and loss.metrics["error"] == pytest.approx(0.025, abs=1e-6)
    (loss.total / loss.count).backward()
    assert z.grad[0].tolist() == pytest.approx([0.05, -0.1, 0, -0.05, 0.1], abs=1e-6)


def test_the_mean_is_over_all_ratings_of_the_batch(make_batch) -> None:
    """Four errors of the card's row and one of 1: (.1 + 1) / 5."""
    rated = {"helpfulness": 3, "correctness": 3, "complexity": 2, "verbosity": 2}
    loss, _ = cost(make_batch, [CARD, [0, 0, 0, 0, 0.0]], [rated, {"correctness": 1, "unknown": 9}])
    assert loss.count == 5 and float(loss.total.detach()) == pytest.approx(1.1, abs=1e-5)


def test_nothing_rated_is_a_finite_0_with_a_graph(make_batch) -> None:
    loss, z = cost(make_batch, [CARD], [{"helpfulness": None}])
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and loss.count == 0 and z.grad.abs().sum() == 0
    assert loss.metrics["error"] == 0


def test_the_head_must_have_attributes() -> None:
    for head in ({}, {"head": Scalar()}):
        with pytest.raises(ValueError, match=r"alignkit\.heads\.Attributes"):
            RMRegression(**head)


def test_names_and_responses_are_looked_for_before_the_first_step() -> None:
    rows = [{"id": 0, "response": "a", "ratings": dict.fromkeys(NAMES, 1) | {"verbosity": None}}]
    survey = algo().survey
    with pytest.raises(UserError, match=r"algo\.head\.names: no training row has a rating 'verbosity'"):
        survey(None, rows, None, [])  # type: ignore[arg-type]
    rows.append({"id": 1, "response": "b", "ratings": {"verbosity": 0}})
    survey(None, rows, None, [])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"1 training rows have ratings but no response\. Set data\.response"):
        survey(None, [*rows, {"id": 2, "response": None, "ratings": {}}], None, [])  # type: ignore[arg-type]
