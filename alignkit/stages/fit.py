"""The supervised loop: batches drawn from a data set, one optimizer step each. ``sft`` and its kin are thin layers on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alignkit import preflight, ranks
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.ops import warmup_decay
from alignkit.run import Run


def fit(
    run: Run,
    policy: Any,
    algo: Any,
    rows: list[Row],
    collate: Callable[[list[Row]], Batch],
    held_out: Any,
    texts: list[str],
) -> dict[str, Any]:
    """Train ``policy``, or a reward model, with ``algo.loss`` on ``rows`` and finish the run.

    The algorithm brings batch_size, steps or epochs, lr, warmup, schedule, max_grad_norm and micro_tokens.
    """
    steps = algo.steps_over(len(rows))
    run.ended_by = "algo.steps" if algo.steps else "algo.epochs"
    algo.survey(policy, rows, run, texts)
    optimizer = run.optimizer(policy, algo, steps)
    if run.checkpoint:
        algo.load_state(run.state["algo"])
    preflight.fit(run, policy, algo, rows, collate, optimizer, steps)
    if run.cfg.model.path and not run.checkpoint:  # what is built from scratch has nothing to show yet
        run.begin(policy, optimizer, algo, held_out)
    with run.training(steps):
        for step in range(run.first_step, steps):
            run.seed_globally(step)
            policy.model.train()
            with run.phase("update"):
                batch = collate(run.draw(rows, algo.batch_size, step))
                rate = algo.lr * warmup_decay(step, steps, algo.warmup, algo.schedule, algo.floor)
                with torch.no_grad():
                    whole = algo.whole(policy, batch, run.generator(step, "whole"))
                    parts = ranks.split(whole, algo.micro_tokens)
                metrics = run.update(
                    optimizer,
                    lambda part: algo.loss(policy, part),
                    parts,
                    algo.max_grad_norm,
                    step,
                    [rate] * len(optimizer.param_groups),
                )
                run.count("tokens/trained", float(sum(part.mask.sum() for part in parts)))
            policy.model.eval()
            run.end_step(step + 1, steps, {**metrics, "lr": rate}, policy, optimizer, algo, held_out)
    return run.finish(policy, steps, held_out)
