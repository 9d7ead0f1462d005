"""Stage ``study``: an experiment without a language model, in one call; its tables and its verdict."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from alignkit.config import signature
from alignkit.errors import UserError
from alignkit.run import Run


def run(cfg: DictConfig, run: Run, data: None, algo: Any, reward: None) -> dict[str, Any]:
    """Run the study with the run's seed and write ``tables.md`` and ``result.json``."""
    with run.phase("study"):
        try:
            found = algo.run(cfg.seed)
        except ValueError as e:  # settings that leave nothing to measure
            raise UserError(f"algo: {e}") from None
    result = {
        "status": "finished", "stage": "study", "name": cfg.name, "seed": cfg.seed, "signature": signature(cfg),
        **found, "seconds": {"study": run.ledger["seconds/study"]}, "directory": str(run.dir),
    }  # fmt: skip
    (run.dir / "tables.md").write_text(_text(result, rows=None) + "\n", encoding="utf-8")
    run.write_json("result.json", result)
    return result


def report(result: dict[str, Any]) -> str:
    """The tables that fit a screen, in Markdown, and the verdict."""
    return "\n\n".join([_text(result, rows=32), f"files: {result['directory']} (all tables: tables.md)"])


def _text(result: dict[str, Any], rows: int | None) -> str:
    tables = {name: found for name, found in result["tables"].items() if rows is None or len(found) <= rows}
    return "\n\n".join([*(f"## {name}\n\n{_table(found)}" for name, found in tables.items()), result["verdict"]])


def _table(rows: list[dict[str, Any]]) -> str:
    """A column a key; a value with bounds ``X_low`` and ``X_high`` has them in brackets."""
    keys = [k for k in rows[0] if not k.endswith(("_low", "_high"))]
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = []
        for key in keys:
            bounds = f" [{_number(row[f'{key}_low'])}, {_number(row[f'{key}_high'])}]" if f"{key}_low" in row else ""
            cells.append(_number(row[key]) + bounds)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
