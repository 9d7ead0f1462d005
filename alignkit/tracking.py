"""wandb: never asks, never fails a run, goes on under the same id after a resume."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


class Tracker:
    """One wandb run for one run directory; ``metrics.jsonl`` is written whatever happens here."""

    def __init__(self, cfg: DictConfig, directory: Path, on: bool = True) -> None:
        self.id = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
        self._run: Any = None
        mode = _mode(cfg.run.wandb) if on else "disabled"
        if mode == "disabled":
            return
        for attempt in (mode, "offline") if mode == "online" else (mode,):
            try:
                import wandb

                self._run = wandb.init(
                    project=cfg.run.project,
                    name=directory.name,
                    id=self.id,
                    resume="allow" if attempt == "online" else None,
                    dir=directory,
                    mode=attempt,  # type: ignore[arg-type]
                    group=cfg.name,
                    config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
                    settings=wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True),
                )
                return
            except Exception as e:  # no network, no service, a bad key: the run matters more than its log
                print(f"warning: wandb ({attempt}) is not available: {type(e).__name__}: {e}", file=sys.stderr)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
            except Exception as e:
                print(f"warning: wandb stopped: {e}", file=sys.stderr)
                self._run = None

    def finish(self, result: dict[str, Any] | None = None) -> None:
        if self._run is not None:
            try:
                if result:
                    self._run.summary.update(
                        {k: result[k] for k in ("status", "weights_sha256", "data_sha256") if k in result}
                    )
                self._run.finish()
            except Exception as e:
                print(f"warning: wandb stopped: {e}", file=sys.stderr)
            self._run = None


def _mode(wanted: str) -> str:
    """``auto``: what WANDB_MODE says, else online where a key is set, else offline."""
    if wanted != "auto":
        return wanted
    said = os.environ.get("WANDB_MODE")
    if said in ("online", "offline", "disabled"):
        return said
    netrc = Path.home() / ".netrc"
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    )
    return "online" if has_key else "offline"
