"""From a composed configuration to a stage: check, directory, data, stage, report."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from alignkit.config import check
from alignkit.data import overlap
from alignkit.errors import UserError


def launch(cfg: DictConfig) -> dict[str, Any]:
    """Run one configuration; returns what ``result.json`` holds.

    A directory with a finished run is left alone, one with an unfinished run is gone on with. Nothing heavy is
    imported before the configuration and the data have been checked.
    """
    check(cfg)
    directory = Path(cfg.run.dir)
    if cfg.run.overwrite:
        _clear(directory)
    finished = directory / "result.json"
    if finished.exists():
        result: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        print(f"{directory} is finished; nothing to do. Start anew with run.overwrite=true.")
        return result
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if cfg.stage == "pipeline":
        from alignkit.stages import pipeline

        return pipeline.run(cfg)

    data = _build(cfg.data, "data")
    splits = {split: len(data.rows(split)) for split in ("train", "dev", "test")}
    if data.show:
        from alignkit.show import show_rows

        show_rows(cfg, data)
        return {}
    record = {"sources": {s: getattr(data, s) for s in splits}, "rows": splits, "sha256": data.fingerprint()}
    record["overlap"] = {s: overlap(data.rows("train"), data.rows(s)) for s in ("dev", "test") if splits[s]}
    for split, n in record["overlap"].items():
        if n and cfg.stage != "evaluate":
            print(
                f"warning: {n} of {splits[split]} {split} prompts stand word for word in the training data.",
                file=sys.stderr,
            )

    import torch

    from alignkit.run import Run

    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    algo = _build(cfg.algo, "algo") if cfg.stage != "evaluate" else None
    reward = _build(cfg.reward, "reward") if cfg.reward else None
    stage = importlib.import_module(f"alignkit.stages.{cfg.stage}")
    run = Run(cfg, record["sha256"], sys.argv)
    run.write_json("data.json", record)
    try:
        result = stage.run(cfg, run, data, algo, reward)
    finally:
        run.close()
    from alignkit.stages.evaluate import report

    print(report(result))
    return result


def _build(node: DictConfig, name: str) -> Any:
    """Instantiate a node; a value that its class refuses is the user's mistake."""
    try:
        return instantiate(node, _convert_="object")
    except Exception as e:
        cause = e.__cause__ or e
        if isinstance(cause, (ValueError, TypeError, UserError)):
            raise UserError(f"{name}: {cause}") from None
        raise


def _clear(directory: Path) -> None:
    for path in directory.glob("*"):
        if path.name != ".hydra":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def objective(result: dict[str, Any], cfg: DictConfig) -> float | None:
    """What a sweeper maximises: the selected metric on dev, else on test."""
    if result.get("best"):
        return float(result["best"]["value"])
    evaluation = result.get("evaluation") or {}
    test = (evaluation.get("after") or evaluation).get("test", {})
    value = test.get(cfg.evaluate.select, {}).get("value")
    return None if value is None else float(value)
