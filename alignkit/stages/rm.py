"""Stage ``rm``: train a reward model on pairs or ratings, and measure it on held-out ones."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.algos._rm import RM
from alignkit.data import Data, Row
from alignkit.errors import UserError
from alignkit.reward_model import both_sides
from alignkit.run import Run
from alignkit.stages.evaluate_rm import HeldOutRewards
from alignkit.stages.fit import fit

EXAMPLES = 512  # training rows whose scores set the mean and the deviation


def run(cfg: DictConfig, run: Run, data: Data, algo: RM, reward: Any) -> dict[str, Any]:
    """Train on the training rows; rank held-out ones before (where the model was trained before), now and then, and after."""
    refuse_other_data(cfg, data, algo)
    rows = algo.prepare(data.rows("train"), data.sides)
    model = algo.build(OmegaConf.to_object(cfg.model), cfg.seed, data.texts(), run.checkpoint)  # type: ignore[arg-type]
    _tell_cut(model, rows, run)
    model.examples = responses_of(rows[:: max(1, len(rows) // EXAMPLES)])
    held_out = HeldOutRewards(cfg.evaluate, data, run)
    return fit(run, model, algo, rows, lambda part: algo.batch(model, part), held_out, data.texts())


def refuse_other_data(cfg: DictConfig, data: Data, algo: RM) -> None:
    """Refuse rows that have nothing for the method to learn from."""
    if not data.gives(algo.wants):
        keys = "data.ratings" if algo.wants == "ratings" else "data.chosen and data.rejected, or data.pairing"
        raise UserError(f"{cfg.name} learns from {algo.wants}: set {keys}, or choose other data (`alignkit list`).")


def responses_of(rows: list[Row]) -> list[Row]:
    """A row a response: both of a pair."""
    return both_sides(rows) if "chosen" in rows[0] else rows


def _tell_cut(model: Any, rows: list[Row], run: Run) -> None:
    given = [row for row in responses_of(rows) if row["response"] is not None]
    n = model.too_long(given) if given else 0
    if n:
        run.progress.say(
            f"warning: {n} training responses do not fit into {model.limit} tokens with their prompts: they are cut at the end, "
            f"then prompts at the beginning (algo.max_tokens)."
        )
