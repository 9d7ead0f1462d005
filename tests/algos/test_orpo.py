"""ORPO against the method card (baselines.md, "Offline preference losses") and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from running import tokens

from alignkit.algos._pref import Pairs
from alignkit.algos.orpo import ORPO

CARD = Pairs(  # lp+ -10, lp- -14, ref -11, -13, lengths 5, 7
    torch.tensor([[-10.0, -14.0]], dtype=torch.float64),
    torch.tensor([[-11.0, -13.0]], dtype=torch.float64),
    *tokens([5, 7]),
)

AVERAGES = Pairs(torch.tensor([[-2.0, -3.0]], dtype=torch.float64), None, *tokens([4, 4]))  # -.5 and -.75


def test_card_vectors() -> None:
    """Averages -.5 and -.75: difference of log odds .543399, -log sigmoid .457913, with lambda .1 and the NLL .545791."""
    assert ORPO().margins(AVERAGES).tolist() == pytest.approx([0.543399], abs=1e-6)
    assert ORPO(weight=0.1).pair_losses(AVERAGES).tolist() == pytest.approx([0.545791], abs=1e-6)
    assert (ORPO(weight=1.0).pair_losses(AVERAGES) - 0.5).tolist() == pytest.approx([0.457913], abs=1e-6)


def test_equal_averages_cost_ln_2() -> None:
    pairs = Pairs(torch.tensor([[-2.0, -1.0]]), None, *tokens([4, 2]))
    assert (ORPO(weight=1.0).pair_losses(pairs) - 0.5).tolist() == pytest.approx([math.log(2)])


def test_a_certain_response_has_finite_odds_and_gradient() -> None:
    logprobs = torch.tensor([[0.0, -3.0]], requires_grad=True)
    ORPO().pair_losses(Pairs(logprobs, None, *tokens([1, 2]))).sum().backward()
    assert torch.isfinite(logprobs.grad).all()


def test_ranges() -> None:
    with pytest.raises(ValueError, match="weight"):
        ORPO(weight=-0.1)
