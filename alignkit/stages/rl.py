"""Stage ``rl``: sample, score, credit, update. It never asks which algorithm it runs."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from alignkit.algos._rl import RL
from alignkit.batch import Batch
from alignkit.data import Data
from alignkit.errors import UserError
from alignkit.ops import group_mean, warmup_decay
from alignkit.policy import load
from alignkit.rewards import Reward
from alignkit.run import Run
from alignkit.stages.evaluate import HeldOut


def run(cfg: DictConfig, run: Run, data: Data, algo: RL, reward: Reward) -> dict[str, Any]:
    """Improve a policy on its own samples; evaluate before, now and then on dev, and after."""
    rows = data.rows("train")
    policy = load(OmegaConf.to_object(cfg.model), cfg.seed, data.texts(), run.checkpoint)  # type: ignore[arg-type]
    optimizer = run.optimizer(policy.model, algo, algo.steps)
    held_out = HeldOut(cfg.evaluate, data, reward, run)
    if run.checkpoint:
        algo.load_state(run.state["algo"])
    else:
        run.before = held_out.test(policy, "before")

    with run.training(algo.steps):
        for step in range(run.first_step, algo.steps):
            run.seed_globally(step)  # for a reward that draws from torch's own generator
            with run.phase("sample"):
                prompts = run.draw(rows, algo.prompts_per_step, step)
                batch = algo.sample(policy, prompts, reward, run.generator(step, "sample"))
            with run.phase("score"):
                batch = algo.credit(batch.with_(scores=_checked(reward(batch), batch)))
            with run.phase("update"):
                lr = algo.lr * warmup_decay(step, algo.steps, algo.warmup, algo.schedule, algo.floor)
                for _ in range(algo.epochs):
                    for part in batch.minibatches(algo.minibatches):
                        stats = run.update(
                            policy.model, optimizer, lambda rows: algo.loss(policy, rows),
                            part.split(algo.micro_tokens), algo.max_grad_norm, step, lr,
                        )  # fmt: skip
            _count(run, batch, algo)
            every = cfg.run.samples_every
            if every and (step % every == 0 or step + 1 == algo.steps):
                run.samples(step + 1, batch)
            metrics = {**_metrics(batch, algo), **algo.metrics(batch), **stats, "lr": lr, **run.speed()}
            run.end_step(step + 1, algo.steps, metrics, policy, optimizer, algo, held_out)
    return run.finish(policy, algo.steps, held_out)


def _checked(scores: Tensor, batch: Batch) -> Tensor:
    """Scores (B,) as float32.

    Raises:
        UserError: another shape, or a score that is not finite.
    """
    if scores.shape != (len(batch),):
        raise UserError(f"the reward gave scores of shape {tuple(scores.shape)} for {len(batch)} responses.")
    bad = (~torch.isfinite(scores.float())).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the reward of row {batch.rows[bad[0]]['id']} is {float(scores[bad[0]])}, response {batch.responses[bad[0]]!r}."
        )
    return scores.float()


def _count(run: Run, batch: Batch, algo: RL) -> None:
    run.count("samples", len(batch))  # a greedy probe counts in tokens and seconds, not here
    run.count("tokens/sampled", float(batch.mask.sum()) + batch.probe_tokens)
    run.count("tokens/trained", float(batch.mask.sum()) * algo.epochs)


def _metrics(batch: Batch, algo: RL) -> dict[str, float]:
    """Reward, its spread, and what shows that something is wrong: dead groups, length, sequences cut off."""
    assert batch.scores is not None and batch.logprobs is not None and batch.advantages is not None
    means = group_mean(batch.scores, batch.group)[batch.group_starts()]  # over rows, hard inputs would weigh more
    return {
        "reward": float(means.mean()),
        "reward_std": float(means.std(correction=0)),
        "zero_advantage": float((batch.advantages.abs().sum(1) == 0).float().mean()),
        "length": float(batch.lengths.float().mean()),
        "cut_off": float((batch.lengths == algo.max_new_tokens).float().mean()),
        "nll_sampled": -float((batch.logprobs * batch.mask).sum() / batch.mask.sum()),
    }
