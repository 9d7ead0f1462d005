"""SimPO against the method card (baselines.md, "Offline preference losses") and by hand."""

from __future__ import annotations

import pytest
import torch
from running import tokens

from alignkit.algos._pref import Pairs, right
from alignkit.algos.simpo import SimPO

CARD = Pairs(  # lp+ -10, lp- -14, ref -11, -13, lengths 5, 7
    torch.tensor([[-10.0, -14.0]], dtype=torch.float64),
    torch.tensor([[-11.0, -13.0]], dtype=torch.float64),
    *tokens([5, 7]),
)

AVERAGES = Pairs(torch.tensor([[-2.0, -3.0]], dtype=torch.float64), None, *tokens([4, 4]))  # -.5 and -.75


def test_card_vector() -> None:
    """beta 2, gamma 1 on averages -.5 and -.75: margin .5 - 1, loss .974077."""
    assert SimPO(beta=2.0, gamma=1.0).pair_losses(AVERAGES).tolist() == pytest.approx([0.974077], abs=1e-6)


def test_length_does_not_count() -> None:
    longer = Pairs(AVERAGES.logprobs * torch.tensor([[1.0, 5.0]]), None, *tokens([4, 20]))
    assert SimPO().pair_losses(longer).tolist() == pytest.approx(SimPO().pair_losses(AVERAGES).tolist())


def test_a_pair_is_ranked_by_the_averages_whatever_the_margin_asked_for() -> None:
    assert right(SimPO(gamma=100.0).margins(AVERAGES)).tolist() == [1.0]


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"gamma": -1.0}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimPO(**wrong)
