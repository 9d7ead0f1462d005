"""Dynamic KD by uncertainty: the weight worked by hand (arXiv 2109.11295)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import mean_loss, worked

from alignkit.algos.dynamic_kd import DynamicKD


def test_vector(tmp_path: Path) -> None:
    """p_S = softmax([2, 0.5]) = (0.817574, 0.182426), whose entropy 0.475052 is 0.685356 of log 2; 1.701413 + 0.685356 * 1.411847."""
    algo, student, batch = worked(DynamicKD(), tmp_path / "t")
    assert mean_loss(algo, student, batch) == pytest.approx(2.669030, abs=2e-5)
    metrics = algo.loss(student, batch).metrics
    assert metrics["weight/response"] == pytest.approx(0.685356, abs=1e-5)
    assert metrics["weight/finetune"] == 1
    assert metrics["loss/response"] == pytest.approx(1.411847, abs=1e-5), "what is logged is the loss without it"


def test_the_weight_has_no_gradient(tmp_path: Path) -> None:
    """At temperature 2 that of the two losses: softmax(z_S) - y, and w T (softmax(z_S / T) - softmax(z_T / T))."""
    algo, student, batch = worked(DynamicKD(), tmp_path / "t")
    loss = algo.loss(student, batch)
    (loss.total / loss.count).backward()
    z, t = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0])
    wanted = z.softmax(-1) - torch.tensor([0.0, 1.0]) + 0.685356 * 2 * ((z / 2).softmax(-1) - (t / 2).softmax(-1))
    torch.testing.assert_close(student.model.classifier.bias.grad, wanted, atol=1e-5, rtol=0)


def test_an_even_student_listens_fully_and_a_sure_one_not_at_all(tmp_path: Path) -> None:
    algo, student, batch = worked(DynamicKD(), tmp_path / "t")
    for bias, weight in (([0.7, 0.7], 1.0), ([60.0, 0.0], 0.0)):
        with torch.no_grad():
            student.model.classifier.bias.copy_(torch.tensor(bias))
        assert algo.loss(student, batch).metrics["weight/response"] == pytest.approx(weight, abs=1e-5)
