"""Stage ``rl``: sample, score, credit, update. It never asks which algorithm it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_model
from torch import Tensor

from alignkit import engines, preflight, ranks
from alignkit.algos._rl import RL
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Data
from alignkit.ops import group_mean
from alignkit.policy import Policy, load, reference
from alignkit.rewards import Reward, judged
from alignkit.run import Run
from alignkit.scoring import by_parts
from alignkit.stages.evaluate import HeldOut


def run(cfg: DictConfig, run: Run, data: Data, algo: RL, reward: Reward) -> dict[str, Any]:
    """Improve a policy on its own samples; evaluate before, now and then on dev, and after."""
    rows = data.rows("train")
    engine = engines.build(cfg, algo)
    model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
    policy = load(model, cfg.seed, data.texts(), run.checkpoint)
    policy.drop_dropout()
    if algo.critic is not None:
        policy.critic = algo.critic.build(policy.model)
        if run.checkpoint:
            with run.reading():
                load_model(policy.critic, run.checkpoint / "state" / "critic.safetensors")
    start = reference(policy, model, cfg.seed, data.texts(), algo.micro_tokens) if algo.wants_reference else None
    optimizer = run.optimizer(policy, algo, algo.steps)
    held_out = HeldOut(cfg.evaluate, data, reward, run)
    if run.checkpoint:
        algo.load_state(run.state["algo"])
    preflight.rl(run, policy, algo, rows, reward, optimizer)
    if not run.checkpoint:
        run.begin(policy, optimizer, algo, held_out)

    steps = run.first_step if _over(algo, run) else algo.steps
    if steps < algo.steps:  # it was passed in the step before a stop
        run.ended_by = _limit(algo, run)
    with run.training(steps):
        for step in range(run.first_step, steps):
            run.seed_globally(step)  # for a reward that draws from torch's own generator
            algo.at(step)
            prompts = run.draw(rows, algo.rows_per_step, step)
            shape = f"{len(prompts)} prompts, up to {algo.max_new_tokens} new tokens a response"
            with run.phase("sample", shape), policy.drawing(engine):
                batch = algo.sample(policy, prompts, reward, run.generator(step, "sample"))
            run.count("samples", len(batch.drawn()))  # dropped and greedy responses count in tokens and seconds alone
            run.count("tokens/sampled", float(batch.drawn().mask.sum()) + batch.probe_tokens)
            with run.phase("score", preflight.shape_of(batch)):
                scored = score(algo, policy, reward, start, batch)
                algo.observe(scored)
                batch = engines.corrected(engine, algo.credit(scored))
            run.count("tokens/trained", float(batch.mask.sum()) * algo.epochs)
            with run.phase("update"):
                policy.train(model.gradient_checkpointing)  # dropout is off: this only lets layers recompute
                for _ in range(algo.epochs):
                    for part in batch.minibatches(algo.minibatches):
                        stats = run.update(
                            optimizer, lambda rows: algo.loss(policy, rows),
                            ranks.split(part, algo.micro_tokens), algo.max_grad_norm, step, algo.rates(step),
                        )  # fmt: skip
                policy.train(False)
            watched, every = run.look(step + 1, [scored.drawn()]), cfg.run.samples_every
            if every and (step % every == 0 or step + 1 == steps or run.audit.new):
                run.samples(step + 1, batch)
            metrics = {**watched, **_metrics(scored.drawn(), batch), **algo.metrics(batch), **stats}
            metrics |= engines.mismatch(scored.drawn())
            if step == run.first_step and metrics["cut_off"] == 1:
                run.progress.say(f"warning: every response was cut off at algo.max_new_tokens={algo.max_new_tokens}.")
            metrics |= {"lr": algo.rates(step)[0], **run.speed()}
            coefficient, nats = algo.kl, algo.adapt(scored)
            if nats is not None:
                metrics |= {"kl": nats, "kl_coefficient": coefficient}
            if step + 1 < steps and _over(algo, run):
                steps, run.ended_by = step + 1, _limit(algo, run)
                run.progress.say(
                    f"ends after step {steps}: {run.ended_by}={OmegaConf.select(cfg, run.ended_by)} is passed."
                )
            run.end_step(step + 1, steps, metrics, policy, optimizer, algo, held_out)
            if step + 1 == steps:
                break
    return run.finish(policy, steps, held_out)


def _over(algo: RL, run: Run) -> bool:
    """Whether the run is at its end before its last step: a limit on the KL or on sampled tokens is passed, or an alarm
    of the audit rang."""
    spent = run.ledger.get("tokens/sampled", 0.0)
    return algo.over or run.audit.over or (algo.token_budget is not None and spent >= algo.token_budget)


def _limit(algo: RL, run: Run) -> str:
    return "algo.kl_limit" if algo.over else "audit.stop" if run.audit.over else "algo.token_budget"


def score(algo: RL, policy: Policy, reward: Reward, start: Callable[[Batch], Tensor] | None, batch: Batch) -> Batch:
    """The sampled batch with scores, and the start model's log-probabilities and values where the method wants them."""
    if batch.scores is None:
        batch = judged(reward, batch)
    if start is not None:
        batch = batch.with_(ref_logprobs=start(batch))
    critic = algo.critic
    if critic is not None:
        with torch.no_grad():
            values = by_parts(batch, algo.micro_tokens, lambda part: critic.values(policy.value_outputs(part)))
        batch = batch.with_(values=values * batch.mask)
    return batch


def _metrics(batch: Batch, credited: Batch) -> dict[str, float]:
    """Reward, its spread, and what shows that something is wrong: dead groups, length, sequences cut off."""
    assert batch.scores is not None and batch.logprobs is not None and credited.advantages is not None
    means = group_mean(batch.scores, batch.group)[batch.group_starts()]  # over rows, hard inputs would weigh more
    return {
        "reward": float(means.mean()),
        "reward_std": float(means.std(correction=0)),
        "zero_advantage": float((credited.advantages.abs().sum(1) == 0).float().mean()),
        "length": float(batch.lengths.float().mean()),
        "cut_off": float((~batch.extra["ended"]).float().mean()),
        "nll_sampled": -float((batch.logprobs * batch.mask).sum() / batch.mask.sum()),
    }
