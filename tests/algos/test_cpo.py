"""CPO against the method card (baselines.md, "Offline preference losses") and by hand."""

from __future__ import annotations

import pytest
import torch
from running import tokens

from alignkit.algos._pref import Pairs, right
from alignkit.algos.cpo import CPO

CARD = Pairs(  # lp+ -10, lp- -14, ref -11, -13, lengths 5, 7
    torch.tensor([[-10.0, -14.0]], dtype=torch.float64),
    torch.tensor([[-11.0, -13.0]], dtype=torch.float64),
    *tokens([5, 7]),
)


def test_worked_by_hand() -> None:
    """lp -10 and -14 over 5 and 7 tokens, beta .1: -log sigmoid(.4) = .513015; likelihood 10 / 5, or 10 of the whole."""
    assert CPO(weight=0.0).pair_losses(CARD).tolist() == pytest.approx([0.513015], abs=1e-6)
    assert CPO().pair_losses(CARD).tolist() == pytest.approx([2.513015], abs=1e-6)
    assert CPO(likelihood="sum", weight=0.5).pair_losses(CARD).tolist() == pytest.approx([5.513015], abs=1e-6)


def test_a_pair_is_ranked_by_the_sums() -> None:
    assert CPO().margins(CARD).tolist() == pytest.approx([0.4])
    assert right(CPO().margins(CARD)).tolist() == [1.0]


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"weight": -1.0}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CPO(**wrong)
