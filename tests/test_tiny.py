"""The shortest checks of all: everything imports, and a policy generates, scores and learns."""

from __future__ import annotations

import importlib
import pkgutil

import torch

import alignkit
from alignkit import losses
from alignkit.decode import Decode


def test_every_module_imports():
    names = [m.name for m in pkgutil.walk_packages(alignkit.__path__, "alignkit.") if not m.name.endswith("__main__")]
    assert {"alignkit.batch", "alignkit.algos.esrl", "alignkit.stages.rl"} <= set(names)
    for name in names:
        importlib.import_module(name)


def test_generate(policy, rows):
    """Ragged counts, whole groups in order, the rows' own objects."""
    data = rows(3)
    batch = policy.generate(data, [2, 1, 3], Decode(max_new_tokens=5), generator=torch.Generator().manual_seed(0))
    assert batch.group.tolist() == [0, 0, 1, 2, 2, 2]
    assert all(batch.rows[i] is data[g] for i, g in enumerate(batch.group.tolist()))
    assert batch.response_ids.shape == batch.mask.shape == batch.logprobs.shape
    assert set(batch.lengths.tolist()) <= {1, 2, 3, 4, 5}
    assert len(batch.responses) == 6
    assert not policy.model.training


def test_forward(policy, rows):
    """Log-probabilities are negative at real tokens and zero at padding, and carry a gradient."""
    batch = policy.demonstrations(rows(3))
    logprobs = policy.forward(batch)
    assert batch.lengths.unique().numel() > 1, "the rows must differ in length"
    assert logprobs.shape == batch.mask.shape
    assert logprobs.requires_grad
    assert (logprobs[batch.mask] < 0).all()
    assert (logprobs[~batch.mask] == 0).all()


def test_one_update_lowers_the_loss(policy, rows):
    batch = policy.demonstrations(rows(4))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    before = losses.nll(policy.forward(batch), batch.mask)
    (before.total / before.count).backward()
    optimizer.step()
    after = losses.nll(policy.forward(batch), batch.mask)
    assert after.count == before.count == float(batch.mask.sum())
    assert float(after.total.detach()) < float(before.total.detach()) - 1e-3
