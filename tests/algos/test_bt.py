"""Bradley–Terry reward models: the card vectors of helpsteer2.md and ultrarm.md, and sums worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.algos.bt import BT
from alignkit.errors import UserError
from alignkit.heads import Attributes, Scalar


def given(scores: list[float], head: Any = None, temperature: float = 1.0) -> Any:
    """A model that gives these outputs."""
    z = torch.tensor(scores, dtype=torch.float64)
    z = (z[:, None] if z.dim() == 1 else z).requires_grad_()
    head = head or Scalar()
    margins = lambda z: head.margins(z[0::2], z[1::2]) / temperature  # noqa: E731
    return SimpleNamespace(outputs=lambda batch: (z, None), head=head, margins=margins, z=z)


def pairs(make_batch, *margins: Any):
    batch = make_batch([2] * len(margins))
    for row, margin in zip(batch.rows[0::2], margins, strict=True):
        row["margin"] = margin
    return batch


@pytest.mark.parametrize(
    ("form", "d", "m", "wanted"),
    [("none", 1.5, 2, 0.201413), ("subtract", 1.5, 2, 0.974077), ("scale", 1.5, 2, 0.402827), ("subtract", 2.0, 1.25, 0.386871)],
)  # fmt: skip
def test_card_vectors(make_batch, form: Any, d: float, m: float, wanted: float) -> None:
    """log(1 + e^.5) is .974077; the card's last digit, 4, is a slip."""
    model = given([d + 0.7, 0.7, 0.0, -d])
    loss = BT(margin=form).loss(model, pairs(make_batch, m, m))
    assert float(loss.total.detach()) == pytest.approx(2 * wanted, abs=2e-6)
    assert loss.count == 2
    assert loss.metrics == pytest.approx({"preference_accuracy": 1.0, "margin": d})


def test_gradient(make_batch) -> None:
    """-sigmoid(-d) at the chosen score, the opposite at the other: sigmoid(-1.5) = .182426, of -(1.5 - 2) .622459."""
    for form, wanted in (("none", 0.182426), ("subtract", 0.622459), ("scale", 2 * 0.182426)):
        model = given([2.0, 0.5])
        BT(margin=form).loss(model, pairs(make_batch, 2)).total.backward()
        assert model.z.grad.flatten().tolist() == pytest.approx([-wanted, wanted], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"temperature": 0.5}, 0.048587),  # d = 3
        ({"temperature": 3.0}, 0.474077),  # d = .5
        ({"smoothing": 0.1}, 0.351413),  # .9 * .201413 + .1 * 1.701413
        ({"centring": 0.01}, 0.263913),  # .201413 + .01 * 2.5²
        ({"centring": 0.01, "temperature": 0.5}, 0.111087),  # the scores as they are
    ],
)
def test_by_hand(make_batch, settings: dict[str, float], wanted: float) -> None:
    model = given([2.0, 0.5], temperature=settings.get("temperature", 1.0))  # the model has it, as it is saved with it
    loss = BT(**settings).loss(model, pairs(make_batch, None))
    assert float(loss.total.detach()) == pytest.approx(wanted, abs=1e-6)


def test_the_score_of_attributes_is_weighed() -> None:
    head = Attributes(names=["a", "b"], weights=[0.5, -1.0])
    z = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # 0 and -1.5
    assert head.margins(z[:1], z[1:]).tolist() == pytest.approx([1.5])


def test_ties_and_wrong_order_are_counted(make_batch) -> None:
    loss = BT().loss(given([1.0, 1.0, 0.0, 2.0]), pairs(make_batch, 1, 1))
    assert loss.metrics == pytest.approx({"preference_accuracy": 0.25, "margin": -1.0})


@pytest.mark.parametrize("found", [None, "2", True, float("nan")])
def test_a_margin_that_is_no_number_names_the_row(make_batch, found: Any) -> None:
    batch = pairs(make_batch, 1, found)
    with pytest.raises(UserError, match=r"row 1: column 'margin' must be a number for algo\.margin=subtract"):
        BT(margin="subtract").loss(given([1.0, 0.0, 1.0, 0.0]), batch)
    with pytest.raises(UserError, match=r"row 1: column 'margin' must be a number"):  # before the first step
        BT(margin="subtract").survey(None, batch.rows[0::2], None, [])  # type: ignore[arg-type]
    BT().survey(None, batch.rows[0::2], None, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"smoothing": 0.5}, "smoothing"),
        ({"centring": -1.0}, "centring"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"template": "no place"}, "must hold {prompt}"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BT(**settings)
