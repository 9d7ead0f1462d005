"""DPO against the method card (baselines.md, "Offline preference losses") and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from running import tokens

from alignkit.algos._pref import Pairs, right
from alignkit.algos.dpo import DPO

CARD = Pairs(  # lp+ -10, lp- -14, ref -11, -13, lengths 5, 7
    torch.tensor([[-10.0, -14.0]], dtype=torch.float64),
    torch.tensor([[-11.0, -13.0]], dtype=torch.float64),
    *tokens([5, 7]),
)


@pytest.mark.parametrize(
    ("settings", "wanted"), [({}, 0.598139), ({"smoothing": 0.1}, 0.618139), ({"smoothing": 0.1, "correction": "robust"}, 0.573139)]
)  # fmt: skip
def test_card_vectors(settings: dict, wanted: float) -> None:
    """lp+ -10, lp- -14, ref -11, -13, beta .1: d = .2; conservative .9 l + .1 (l + .2); robust (.9 l - .1 (l + .2)) / .8."""
    assert DPO(**settings).pair_losses(CARD).tolist() == pytest.approx([wanted], abs=1e-5)


def test_at_the_start_model_every_pair_costs_ln_2_and_none_is_told_apart() -> None:
    pairs = Pairs(CARD.logprobs, CARD.logprobs.clone(), CARD.ids, CARD.mask)
    assert DPO().pair_losses(pairs).tolist() == pytest.approx([math.log(2)])
    assert right(DPO().margins(pairs)).tolist() == [0.5]


def test_the_robust_loss_is_unbiased() -> None:
    """Its mean over labels that are flipped with probability e is the loss of the true label."""
    flipped = Pairs(CARD.logprobs.flip(1), CARD.ref_logprobs.flip(1), CARD.ids.flip(1), CARD.mask.flip(1))
    robust = DPO(smoothing=0.3, correction="robust")
    mean = 0.7 * robust.pair_losses(CARD) + 0.3 * robust.pair_losses(flipped)
    torch.testing.assert_close(mean, DPO().pair_losses(CARD))


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"smoothing": 0.5}, {"smoothing": -0.1}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DPO(**wrong)
