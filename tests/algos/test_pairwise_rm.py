"""The comparing reward model's loss against pairwise_rl.md (E1, E2), in both orders; the model is in test_reward_model.py."""

from __future__ import annotations

from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.algos.pairwise_rm import PairwiseRM


def cost(logits: list[float]) -> Any:
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return PairwiseRM().loss(SimpleNamespace(logits=lambda batch: z), None), z  # type: ignore[arg-type]


def test_e1_both_orders() -> None:
    """Yes 1.2 and no .4, in the other order turned round: p = .689974 both times."""
    loss, _ = cost([1.2 - 0.4, 0.4 - 1.2])
    assert float(loss.total.detach()) == pytest.approx(-log(0.689974), abs=1e-6)
    assert loss.metrics == pytest.approx({"preference_accuracy": 1.0, "position_bias": 0.0}, abs=1e-6)


def test_e2_the_orders_disagree() -> None:
    """p(y, anchor) .7 and p(anchor, y) .4: -log .7 and -log .6, each a half; bias .1."""
    loss, z = cost([log(0.7 / 0.3), log(0.4 / 0.6)])
    assert float(loss.total.detach()) == pytest.approx(-(log(0.7) + log(0.6)) / 2, abs=1e-6)
    assert loss.count == 1 and loss.metrics["position_bias"] == pytest.approx(0.1)
    loss.total.backward()
    assert z.grad.tolist() == pytest.approx([-0.3 / 2, 0.4 / 2])


def test_a_mean_over_pairs() -> None:
    loss, _ = cost([1.0, -1.0, -2.0, 2.0, 0.0, 0.0])
    assert loss.count == 3
    assert float(loss.total.detach()) == pytest.approx(0.313262 + 2.126928 + 0.693147, abs=1e-5)
    assert loss.metrics["preference_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)


@pytest.mark.parametrize("template", ["{prompt} {first}", "{prompt} {second}", "{first} {second}", ""])
def test_the_template_must_show_all_three(template: str) -> None:
    with pytest.raises(ValueError, match="template: must hold"):
        PairwiseRM(template=template)
