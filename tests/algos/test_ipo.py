"""IPO against the method card (baselines.md, "Offline preference losses") and by hand."""

from __future__ import annotations

import pytest
import torch
from running import tokens

from alignkit.algos._pref import Pairs, right
from alignkit.algos.ipo import IPO

CARD = Pairs(  # lp+ -10, lp- -14, ref -11, -13, lengths 5, 7
    torch.tensor([[-10.0, -14.0]], dtype=torch.float64),
    torch.tensor([[-11.0, -13.0]], dtype=torch.float64),
    *tokens([5, 7]),
)


@pytest.mark.parametrize(("logprobs", "wanted"), [("sum", 9.0), ("mean", 21.688980)])
def test_card_vectors(logprobs: str, wanted: float) -> None:
    """The paper's form on sums, (2 - 5)²; TRL's on averages over lengths 5 and 7, (1/5 + 1/7 - 5)²."""
    assert IPO(logprobs=logprobs).pair_losses(CARD).tolist() == pytest.approx([wanted], abs=1e-5)


def test_the_margin_aimed_at_is_one_over_two_beta() -> None:
    logprobs = torch.tensor([[-6.0, -11.0]])
    pairs = Pairs(logprobs, torch.tensor([[-8.0, -8.0]]), *tokens([2, 2]))
    assert IPO(beta=0.1).pair_losses(pairs).tolist() == pytest.approx([0.0])
    assert right(IPO().margins(pairs)).tolist() == [1.0]


def test_ranges() -> None:
    with pytest.raises(ValueError, match="beta"):
        IPO(beta=0.0)
