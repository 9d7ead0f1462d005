"""Whole runs beside TRL's trainers: from the same start, on the same tokens, both come to the same weights.

What a run of TRL sampled is given to a run of alignkit's own method; a step of a data set is the whole data set, so that the order
in which both draw does not matter. AdamW's first steps go by the signs of the gradient almost alone, so coordinates whose gradient
is rounding may differ: what is compared is the update as a whole, and a control shows that another loss is far off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from running import composed, train
from safetensors.torch import load_file
from torch import Tensor

from alignkit.algos.grpo import GRPO
from alignkit.algos.rloo import RLOO
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.launch import _build
from alignkit.policy import load
from alignkit.reward_model import Reading, build

RUN = ["run.threads=1", "run.wandb=disabled", "evaluate.every=0", "evaluate.rows=2", "evaluate.bootstrap=0",
       "evaluate.max_new_tokens=2", "evaluate.final=last", "algo.warmup=0", "algo.schedule=constant", "algo.weight_decay=0.0",
       "algo.lr=1e-3", "run.preflight=false"]  # fmt: skip
ARITHMETIC = ["model=tiny_arithmetic", "data=arithmetic", "data.limit=40"]
SAMPLED = [*ARITHMETIC, "algo.steps=1", "algo.prompts_per_step=4", "algo.k=4", "algo.max_new_tokens=24"]


class Kept:
    """A reward of the tokens alone, which keeps what it has judged."""

    seen: ClassVar[list[Batch]] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.seen.append(batch)
        return ((batch.response_ids * batch.mask).sum(1) % 7).float()


def given(policy: Any) -> Batch:
    """What TRL sampled, which was judged first, with the policy's log-probabilities of it."""
    batch = sampled()
    with torch.no_grad():
        return batch.with_(logprobs=policy.forward(batch))


def sampled() -> Batch:
    """The one batch of a training step among those that were judged first; the others are held-out rows."""
    return next(batch for batch in Kept.seen if len(batch) == 16)


class GivenGRPO(GRPO):
    def sample(self, policy: Any, rows: Any, reward: Any, generator: Any) -> Batch:
        return given(policy)


class GivenRLOO(RLOO):
    def sample(self, policy: Any, rows: Any, reward: Any, generator: Any) -> Batch:
        return given(policy)


def update(directory: Path, start: dict[str, Tensor]) -> Tensor:
    """How far a run has moved the weights, in one vector."""
    end = load_file(directory / "final" / "model.safetensors")
    return torch.cat([(end[name] - start[name]).flatten() for name in sorted(end)]).double()


def start_of(words: list[str], reward: bool = False) -> dict[str, Tensor]:
    """The weights that runs with these words start from."""
    cfg = composed(["+algo=sft", *words])
    model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
    texts = _build(cfg.data, "data").texts()
    if not reward:
        return load(model, 0, texts).model.state_dict()
    return dict(build(model, Reading(), 0, texts)._plain().state_dict())


def assert_same(start: dict[str, Tensor], one: Tensor, other: Tensor, control: Tensor) -> None:
    """Two updates are the same, to a few parts in ten thousand; weights to a few in a million; the control is far off."""
    size = torch.cat([w.flatten() for w in start.values()]).double().norm()
    apart = float((one - other).norm() / other.norm())
    assert apart < 5e-4
    assert float((one - other).norm() / size) < 1e-5
    assert float((one - control).norm() / other.norm()) > max(0.05, 100 * apart)


@pytest.mark.parametrize(
    ("theirs", "ours", "same", "own", "control"),
    [
        ("trl_grpo", "grpo", ["algo.trl.loss_type=grpo"], ["algo.kl=0.0"], ["algo.normalize=tokens"]),
        ("trl_grpo", "grpo", [], ["algo.kl=0.0", "algo.normalize=tokens"], ["algo.normalize=responses"]),
        ("trl_rloo", "rloo", ["algo.kl=0.0"], ["algo.kl=0.0", "algo.ratio=sequence"], ["algo.ratio=none", "algo.normalize=responses"]),
    ],
    ids=["grpo", "trl-default", "rloo"],
)  # fmt: skip
def test_one_step_on_the_same_samples(theirs, ours, same, own, control, tmp_path):
    reward = ["+reward._target_=test_trl_parity.Kept"]
    Kept.seen.clear()
    _, one = train(tmp_path, f"+algo={theirs}", *RUN, *SAMPLED, "reward=null", *reward, *same)
    batch = sampled()
    assert batch.lengths.min() < batch.lengths.max(), "rows of unequal length, or the means would agree"
    target = f"algo._target_=test_trl_parity.Given{ours.upper()}"
    words = [f"+algo={ours}", *RUN, *SAMPLED, "reward=null", *reward, target, *own]
    found = [train(tmp_path, *words, *more)[1] for more in ([], control)]
    start = start_of(ARITHMETIC)
    moved = [update(d, start) for d in (one, *found)]
    assert_same(start, *moved)


POLITE = ["data=polite", "data.limit=8", "algo.batch_size=8", "algo.steps=2"]


@pytest.mark.parametrize(
    ("theirs", "ours", "words", "control"),
    [
        ("trl_sft", "sft", ["model=tiny_lists", "data=lists", "data.limit=8", "algo.batch_size=8", "algo.steps=2"], ["algo.trl.loss_type=dft"]),
        ("trl_dpo", "dpo", ["model=tiny_causal", "model.vocab_size=300", *POLITE], ["algo.trl.loss_type=[ipo]"]),
        ("trl_reward", "bt", ["model=tiny_causal", "model.vocab_size=300", *POLITE], ["algo.trl.center_rewards_coefficient=0.5"]),
    ],
    ids=["sft", "dpo", "reward"],
)  # fmt: skip
def test_two_steps_on_the_same_rows(theirs, ours, words, control, tmp_path):
    _, own = train(tmp_path, f"+algo={ours}", *RUN, *words)
    _, one = train(
        tmp_path, f"+algo={theirs}", *RUN, *words, "algo.betas=" + {"sft": "[0.9,0.98]"}.get(ours, "[0.9,0.95]")
    )
    _, other = train(tmp_path, f"+algo={theirs}", *RUN, *words, *control)
    start = start_of([w for w in words if not w.startswith("algo.")], reward=ours == "bt")
    moved = [update(d, start) for d in (own, one, other)]
    assert_same(start, *moved)
