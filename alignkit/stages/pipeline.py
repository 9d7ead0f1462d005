"""Stage ``pipeline``: steps in order, each the command one would type, in its own directory; finished ones are skipped."""

from __future__ import annotations

import importlib
import json
import re
import signal
import string
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit import unread
from alignkit.config import SHARDED, STEPS, check, conf_dir, signature, whole
from alignkit.errors import Stopped, UserError, suggest
from alignkit.files import write_atomically
from alignkit.labels import LABELS


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run every step of ``cfg.steps`` (name → command-line words); ``{name}`` in a word is that earlier step's directory.

    A step's words are ``train`` words. ``run.dir`` inside the pipeline's own directory, its seed, its root, its device and what else of
    ``run`` a step shares are put before them, ``cfg.more`` behind them (``more.ppo="algo.steps=5"``). Each step is a process of its own, so that its memory is given back.

    Raises:
        UserError: a step that fails, or, before any is run, words that cannot be.
    """
    directory = Path(cfg.run.dir)
    write_atomically(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(whole(cfg))))
    done: dict[str, str] = {}
    results: dict[str, Any] = {}
    commands = steps(cfg)
    accept(commands, cfg.run)
    for name, words in commands.items():
        print(f"== {name}: alignkit train {' '.join(words)}", flush=True)
        code, asked = _run_to_its_end([sys.executable, "-m", "alignkit", "train", *words])
        if asked or code == 130:
            raise Stopped(f"stopped in step {name}.")
        if code != 0:
            raise UserError(
                f"pipeline step {name} failed (exit {code}); its message is above. Mend it and repeat the command; with other words, "
                f"add run.name={directory.name} to keep the steps that are finished."
            )
        done[name] = str(directory / name)
        results[name] = json.loads((directory / name / "result.json").read_text(encoding="utf-8"))
    last = results[name]
    result = {**last, "stage": "pipeline", "name": cfg.name, "directory": str(directory), "steps_done": done}
    result["signature"] = signature(cfg)
    text = report(results)
    write_atomically(directory / "report.md", text + "\n")
    write_atomically(directory / "result.json", json.dumps(result, indent=2) + "\n")
    print(f"\n{text}\n\nfiles: {directory}")
    return result


def steps(cfg: DictConfig) -> dict[str, list[str]]:
    """Step of a pipeline → the words of its command.

    Raises:
        UserError: settings that no step would see, or several words in one.
    """
    directory, run = Path(cfg.run.dir), cfg.run
    given: Any = OmegaConf.to_container(cfg.steps, resolve=True)
    more: Any = OmegaConf.to_container(cfg.more, resolve=True)
    lost = [
        where for key, where in unread.given(cfg).items()
        if key.partition(".")[0] in unread.WATCHED and key != "model.device" and "=" in where
    ]  # fmt: skip
    if lost:
        raise UserError(
            f"{', '.join(lost)}: a pipeline has no such settings of its own. Give them to a step, as in "
            f"'more.{next(iter(given))}=\"{lost[0]}\"'."
        )
    known: dict[str, str] = {}
    found = {}
    for name, words in given.items():
        added = more.get(name, [])
        if isinstance(added, str) and re.match(r"\S+=\S+ +\S+=\S", added):
            listed = ", ".join(f'"{word}"' for word in added.split())
            raise UserError(f"more.{name}: {added!r} are several words; give a list: 'more.{name}=[{listed}]'.")
        words = [*words, *([added] if isinstance(added, str) else added)]
        found[name] = [
            f"run.dir={directory / name}",
            f"seed={cfg.seed}",
            f"run.wandb={run.wandb}",
            f"run.root={run.root}",
            f"run.concurrency={run.concurrency}",
            *([f"model.device={cfg.model.device}"] if cfg.model.device != "auto" else []),
            *([f"run.processes={run.processes}"] if run.processes > 1 else []),
            f"run.budget={'null' if run.budget is None else run.budget}",
            *(_fill(w, known, name) for w in _flat(words)),
        ]
        known[name] = str(directory / name)
    return found


def _flat(words: list[Any]) -> list[str]:
    """Words, and lists of words that several steps share (YAML's anchors), in one list."""
    return [one for word in words for one in (_flat(word) if isinstance(word, list) else [word])]


def accept(commands: dict[str, list[str]], run: Any) -> dict[str, DictConfig]:
    """Compose every step and compare it with what its classes accept, before the first is run; step → what it composes.

    Args:
        run: the pipeline's; a step gets ``run.shard`` and ``run.offload`` as words where they have an effect.

    Raises:
        UserError: one that cannot be run; names the step.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from alignkit.cli import hydra_words, uncomposed

    here = GlobalHydra.instance().is_initialized()
    found: dict[str, DictConfig] = {}
    used: set[str] = set()
    with nullcontext() if here else initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name, words in commands.items():
            try:
                found[name] = compose("config", hydra_words(words))
                stage, several = found[name].stage, found[name].run.processes > 1
                shard = run.shard and several and stage in (*SHARDED, "pipeline")
                offload = run.offload and stage in (*STEPS, "pipeline")
                used.update(["shard"] * shard, ["offload"] * offload)
                if shard or offload:  # before its own, which may say otherwise
                    words[:0] = ["run.shard=true"] * shard + ["run.offload=true"] * offload
                    found[name] = compose("config", hydra_words(words))
                check(found[name])
            except UserError as e:
                raise UserError(f"steps.{name}: {e}") from None
            except HydraException as e:
                raise UserError(f"steps.{name}: {uncomposed(e, words)}") from None
    for name in ("shard", "offload"):
        if run[name] and name not in used:
            raise UserError(f"run.{name}: none of these steps can use it. Leave it out.")
    return found


def report(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the test metrics of every step before and after it, and how far an RL step went from its start."""
    from alignkit.stages import evaluate  # with torch, which this process has no use for before

    lines, note = ["| step | metric | before | after |", "|---|---|---|---|"], ""
    stages = {step: importlib.import_module(f"alignkit.stages.{result['stage']}") for step, result in results.items()}
    compared = {step: stage for step, stage in stages.items() if hasattr(stage, "side_by_side")}
    tables = [
        stage.side_by_side({step: results[step] for step in compared if compared[step] is stage})
        for stage in dict.fromkeys(compared.values())
    ]
    own = {step: stage for step, stage in stages.items() if step not in compared}
    own = {step: stage for step, stage in own.items() if hasattr(stage, "summary")}  # what the table has no place for
    for step, result in results.items():
        if step in own or step in compared:
            continue
        evaluation = result.get("evaluation", {})
        before = (evaluation.get("before") or {}).get("test", {})
        after = evaluation.get("after", evaluation) or {}
        for name, cell in after.get("test", after.get("dev", {})).items():
            old = evaluate.cell(name, before[name]) if name in before else ""
            lines.append(f"| {step} | {LABELS.get(name, name)} | {old} | {evaluate.cell(name, cell)} |")
        if result.get("verdict"):
            lines.append(f"| {step} | verdict | | {result['verdict']} |")
        if "kl" in result.get("training", {}):
            lines.append(f"| {step} | KL to the start, nats a response* | 0 | {result['training']['kl']:.2f} |")
            note = "\n\n\\* of the samples from which the last step of these weights learned"
    text = "\n".join(lines) + note if len(lines) > 2 else ""
    sections = {step: f"## {step}\n\n{stage.summary(results[step]).strip()}" for step, stage in own.items()}
    first = [section for step, section in sections.items() if results[step]["stage"] == "judge"]  # the verdict
    rest = [section for step, section in sections.items() if results[step]["stage"] != "judge"]
    return "\n\n".join([*first, *tables, *([f"## steps\n\n{text}" if first else text] if text else []), *rest])


def _run_to_its_end(command: list[str]) -> tuple[int, bool]:
    """(exit code of a step, whether a stop was asked for meanwhile).

    Ctrl-C reaches the step from the terminal, SIGTERM is handed on: it saves and stops by itself.
    """
    step = subprocess.Popen(command)
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        if number == signal.SIGTERM:
            step.terminate()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return step.wait(), asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _fill(word: str, done: dict[str, str], step: str) -> str:
    names = [n for _, n, _, _ in string.Formatter().parse(word) if n]
    for name in names:
        if name not in done:
            raise UserError(f"steps.{step}: {{{name}}} is not an earlier step.{suggest(name, done)}")
    return word.format(**done)
