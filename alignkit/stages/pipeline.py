"""Stage ``pipeline``: steps in order, each the command one would type, in its own directory; finished ones are skipped."""

from __future__ import annotations

import json
import signal
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.errors import Stopped, UserError, suggest


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run every step of ``cfg.steps`` (name → command-line words); ``{name}`` in a word is that earlier step's directory.

    A step's words are ``train`` words. ``run.root`` of the pipeline's own directory and the pipeline's seed are put
    before them. Each step is a process of its own, so that its memory is given back.

    Raises:
        UserError: a step that fails, or a word that names an unknown step.
    """
    directory = Path(cfg.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    done: dict[str, str] = {}
    results: dict[str, Any] = {}
    steps: Any = OmegaConf.to_container(cfg.steps, resolve=True)
    for name, words in steps.items():
        words = [
            f"run.root={directory / name}",
            f"seed={cfg.seed}",
            f"run.wandb={cfg.run.wandb}",
            *(_fill(w, done, name) for w in words),
        ]
        print(f"== {name}: alignkit train {' '.join(words)}", flush=True)
        code = _run_to_its_end([sys.executable, "-m", "alignkit", "train", *words])
        if code == 130:
            raise Stopped(f"stopped in step {name}. Repeat the command to go on.")
        if code != 0:
            raise UserError(
                f"pipeline step {name} failed (exit {code}); its message is above. Mend it and repeat the command."
            )
        finished = max((directory / name).glob("*/result.json"), key=lambda p: p.stat().st_mtime)
        done[name] = str(finished.parent)
        results[name] = json.loads(finished.read_text(encoding="utf-8"))
    last = results[name]
    result = {**last, "stage": "pipeline", "name": cfg.name, "directory": str(directory), "steps_done": done}
    (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _run_to_its_end(command: list[str]) -> int:
    """Exit code of a step. Ctrl-C reaches it from the terminal, SIGTERM is handed on: it saves and stops by itself."""
    step = subprocess.Popen(command)
    old = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: step.terminate()),
    }
    try:
        return step.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _fill(word: str, done: dict[str, str], step: str) -> str:
    names = [n for _, n, _, _ in string.Formatter().parse(word) if n]
    for name in names:
        if name not in done:
            raise UserError(f"steps.{step}: {{{name}}} is not an earlier step.{suggest(name, done)}")
    return word.format(**done)
