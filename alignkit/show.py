"""``data.show=N``: rendered rows with the trained tokens marked, so that templates are seen before they are trained."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from alignkit.config import task_of
from alignkit.data import Data, Row


def show_rows(cfg: DictConfig, data: Data) -> None:
    """Print rows as the model will see them: prompt tokens dim, response tokens in brackets, then their ids; both of a pair."""
    from alignkit import classifier, policy, reward_model

    rows = data.rows("train")
    cfg_model: Any = OmegaConf.to_object(cfg.model)
    if cfg.stage in ("distill", "select") and task_of(cfg.algo) == "classify":
        reader: Any = classifier.load(cfg_model, cfg.seed, data.texts(), classifier.labels_of(rows))
    elif cfg.stage == "rm":
        reading = reward_model.Reading(template=cfg.algo.get("template", "{prompt}"))
        reader = reward_model.build(cfg_model, reading, cfg.seed, data.texts())
    else:
        reader = policy.load(cfg_model, cfg.seed, data.texts())
    render(console(), cfg.stage, reader, rows[: data.show], data)


def console() -> Console:
    """Where rows are printed: a line is never cut."""
    return Console(soft_wrap=True)


def render(out: Console, stage: str, reader: Any, rows: list[Row], data: Data) -> None:
    """Print rows as ``reader`` reads them."""
    from rich.text import Text

    labels = getattr(reader, "labels", None)  # of a classifier
    sides = data.sides if stage in ("rm", "pref") else ("response",)
    for row, ids in zip(rows, reader.prompt_ids(rows), strict=True):
        for side in sides:
            line = Text(f"row {row['id']}{'' if side == 'response' else f' {side}'}  ", style="bold")
            line.append(reader.tokenizer.decode(ids), style="dim")
            answer = reader.encode_responses([row[side]])[0] if row[side] is not None and not labels else []
            line.append(f"  [{row[side]}]" if labels else "", style="green")
            for token in answer:
                line.append(f"[{reader.tokenizer.decode([token])}]", style="green")
            out.print(line, soft_wrap=True)
            more = f"ratings: {row['ratings']}" if "ratings" in row else f"references: {row['references']}"
            out.print(
                f"  {len(ids)} prompt tokens; {len(answer)} of the response: {answer}; {more}"
                if not labels
                else f"  {len(ids)} tokens; label {labels.index(row[side]) + 1} of {len(labels)}",
                style="dim",
                markup=False,
            )
