"""Distillation with a frozen selector: what it weighs, and that it draws nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import mean_loss, worked

from alignkit.algos.selected import Selected
from alignkit.selector import KSM, Constant, Shape


def test_a_constant(tmp_path: Path) -> None:
    """0.5 * 1.701413 + 2 * 1.411847 + 3 * 0.666667 + 0.25 * 2."""
    Constant([0.5, 2.0, 3.0, 0.25]).save(tmp_path)
    found = mean_loss(*worked(Selected(selector=str(tmp_path), loss_scale="none"), tmp_path / "t"))
    assert found == pytest.approx(6.174401, abs=1e-5)


def of_hand(folder: Path, action: str, threshold: float = 0.5) -> str:
    """A module whose actor sees, of h_S = [1, 0, 2] and h_T = [0, 1, 2], the sums 3 and 3 and gives sigmoid of (3, -3, 3 + 3 - 5,
    0): 0.952574, 0.047426, 0.731059, 0.5."""
    module = KSM(Shape(student=3, teacher=3, hidden=2, size=1, action=action, threshold=threshold))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        for side in (module.of_student, module.of_teacher):
            side[0].weight[0] = 1.0
            side[2].weight[0, 0] = 1.0
        module.actor[0].weight.copy_(torch.eye(2))
        module.actor[2].weight.copy_(torch.eye(2))
        module.actor[4].weight.copy_(torch.tensor([[1.0, 0], [0, -1], [1, 1], [0, 0]]))
        module.actor[4].bias[2] = -5.0
    module.save(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("action", "threshold", "weights"),
    [("soft", 0.5, [0.952574, 0.047426, 0.731059, 0.5]), ("hard", 0.5, [1, 0, 1, 0]), ("hard", 0.96, [1, 0, 0, 0]),
     ("hard", 0.04, [1, 1, 1, 1])],
)  # fmt: skip
def test_a_module(tmp_path: Path, action: str, threshold: float, weights: list[float]) -> None:
    """Strictly above the threshold; where nothing is, the labels teach."""
    folder = of_hand(tmp_path, action, threshold)
    algo, student, batch = worked(Selected(selector=folder, loss_scale="none"), tmp_path / "t")
    assert batch.extra["weights"].tolist() == [pytest.approx(weights, abs=1e-6)] * 3
    four = [1.701413, 1.411847, 0.666667, 2.0]
    wanted = sum(w * x for w, x in zip(weights, four, strict=True))
    assert mean_loss(algo, student, batch) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["constant", "soft", "hard"])
def test_a_frozen_selector_draws_nothing(tmp_path: Path, kind: str) -> None:
    """Invariant 7 of the card: neither from the step's generator nor from torch's own; and it stays what it is."""
    if kind == "constant":
        Constant([1.0, 0.5, 0.0, 0.0]).save(tmp_path)
    else:
        of_hand(tmp_path, kind)
    algo, student, batch = worked(Selected(selector=str(tmp_path)), tmp_path / "t")
    files = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    student.model.train()
    generator = torch.Generator().manual_seed(3)
    own, everyones = generator.get_state(), torch.get_rng_state()
    first = algo.weigh(student, batch, generator)
    algo.whole(student, batch, generator)
    assert torch.equal(generator.get_state(), own) and torch.equal(torch.get_rng_state(), everyones)
    assert torch.equal(algo.weigh(student, batch, torch.Generator().manual_seed(4)), first)
    assert not first.requires_grad
    assert student.model.training
    assert files == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
