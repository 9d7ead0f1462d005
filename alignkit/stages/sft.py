"""Stage ``sft``: maximum likelihood of the responses, for causal and encoder–decoder models."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.data import Data
from alignkit.run import Run
from alignkit.stages.evaluate import HeldOut
from alignkit.stages.fit import fit


def run(cfg: DictConfig, run: Run, data: Data, algo: Any, reward: Any) -> dict[str, Any]:
    """Train on the responses of the training rows; evaluate on dev now and then, on test at the end."""
    rows = algo.prepare(data.rows("train"), data.sides)
    policy = algo.build(OmegaConf.to_object(cfg.model), cfg.seed, data.texts(), run.checkpoint)
    held_out = HeldOut(cfg.evaluate, data, reward, run)
    return fit(
        run,
        policy,
        algo,
        rows,
        lambda part: policy.demonstrations(part, algo.max_response_tokens),
        held_out,
        data.texts(),
    )
