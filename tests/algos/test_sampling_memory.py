"""The bytes that two ways of sampling keep, and that they come to the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkit.algos.sampling_memory import KINDS, SamplingMemory, Saved, bench_policy, sampled, single_stage


def test_saved_counts_what_the_backward_pass_needs() -> None:
    """y = relu(x w) of 3 rows: autograd keeps x (3 × 4) for the gradient of w and the result (3 × 2) for that of relu; w is a parameter."""
    layer = torch.nn.Linear(4, 2, bias=False)
    saved = Saved(layer)
    with saved.hooks():
        y = torch.relu(layer(torch.ones(3, 4)))
    saved.freed()
    y.sum().backward()
    assert saved.most == 4 * (3 * 4 + 3 * 2)


@pytest.fixture(scope="module", params=sorted(KINDS))
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SamplingMemory(kind=request.param, lengths=(4, 12, 20), prompts=3).run(0)


def test_both_ways_have_one_gradient(found: dict[str, Any]) -> None:
    assert 0 < found["summary"]["gradient_difference"]["value"] < 1e-5  # 0 would be one way compared with itself


def test_two_stages_keep_less_the_more_so_the_longer(found: dict[str, Any]) -> None:
    short, long, longest = found["tables"]["kept for the backward pass, bytes"]
    assert [row["length"] for row in (short, long, longest)] == [4, 12, 20]
    assert long["two_stages"] < long["single_stage"]
    assert long["share"] < short["share"]
    assert found["summary"]["kept/two_stages/12"]["value"] == long["two_stages"]
    assert found["summary"]["share/12"]["value"] == pytest.approx(long["two_stages"] / long["single_stage"])
    # a single stage keeps a copy of the cache a token: eight more tokens cost more the longer it is already
    assert longest["single_stage"] - long["single_stage"] > long["single_stage"] - short["single_stage"]
    assert longest["two_stages"] - long["two_stages"] == pytest.approx(
        long["two_stages"] - short["two_stages"], rel=0.05
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_single_stage_has_the_log_probabilities_of_the_policy(kind: str) -> None:
    policy, rows = bench_policy(kind, 3, 1)
    batch = sampled(policy, rows, 2, 5, 1)
    assert batch.response_ids.shape == (6, 5) and bool(batch.mask.all())
    one = single_stage(policy, batch, torch.rand(6, 5))
    torch.testing.assert_close(one, policy.forward(batch), atol=1e-5, rtol=0)


def test_the_seed_draws_the_prompts() -> None:
    prompts = [[row["prompt"] for row in bench_policy("causal", 4, seed)[1]] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "rnn"}, "kind must be"), ({"lengths": ()}, "lengths must be"), ({"lengths": (2000,)}, "1,000 tokens"),
     ({"prompts": 0}, "prompts must be at least 1")],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingMemory(**settings)
