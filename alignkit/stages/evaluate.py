"""Stage ``evaluate``: decode held-out rows, score them, write a table and the outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from alignkit import metrics
from alignkit.batch import Batch
from alignkit.config import Evaluate
from alignkit.data import Data, Row
from alignkit.decode import Decode
from alignkit.errors import UserError, suggest
from alignkit.labels import LABELS, PER_CENT
from alignkit.loading import resolve
from alignkit.policy import Policy, load
from alignkit.protocols import answers
from alignkit.rewards import scores_of
from alignkit.run import Run

Table = dict[str, dict[str, float]]


class HeldOut:
    """The dev and test rows, and how they are decoded and scored."""

    def __init__(
        self,
        cfg: Evaluate,
        data: Data,
        reward: Any,
        run: Run,
        ranked: Callable[[str, list[Row]], list[float]] | None = None,
    ) -> None:
        """``ranked``: of a split's pairs, 1 where the policy ranks one as the data do, 0 where not, a half where it is even."""
        self.cfg, self.reward, self.run, self.ranked = cfg, reward, run, ranked
        self.decoded: list[Batch] = []  # what dev was last measured on, with scores where there is a reward
        self.rows = {split: data.rows(split)[: cfg.rows] for split in ("dev", "test")}
        if not cfg.test:
            self.rows["test"] = []

    def dev(self, policy: Policy) -> dict[str, float]:
        """Dev metrics as ``dev/NAME``; empty where there are no dev rows."""
        if not self.rows["dev"]:
            return {}
        with self.run.phase("evaluate"):
            found, _, self.decoded = self._score(policy, "dev")
            scored = found.scores(_ones(self.rows["dev"]))
        return {f"dev/{name}": float(value[0]) for name, value in scored.items()}

    def selected(self, dev: dict[str, float]) -> float:
        """The dev value that picks the best checkpoint."""
        return picked(self.cfg.select, dev)

    def test(self, policy: Policy, name: str, split: str = "test") -> dict[str, Table]:
        """Metrics of a split with intervals, as ``{split: …}``; writes ``outputs-{name}.jsonl``.

        After a run that also kept its outputs from before, ``{"difference": …}`` holds the paired differences.
        """
        rows = self.rows[split]
        if not rows:
            return {}
        with self.run.phase("evaluate"):
            scored, entries, _ = self._score(policy, split)
        path = self.run.dir / f"outputs-{name}.jsonl"
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
        tables = {split: metrics.summary(scored, self.cfg.bootstrap)}
        earlier = self.run.dir / "outputs-before.jsonl"
        if name == "after" and earlier.exists() and self.cfg.bootstrap:
            old = [json.loads(x) for x in earlier.read_text(encoding="utf-8").split("\n") if x]
            tables["difference"] = metrics.difference(_statistics(old), scored, self.cfg.bootstrap)
        return tables

    def _score(self, policy: Policy, split: str) -> tuple[metrics.Sentences, list[dict[str, Any]], list[Batch]]:
        rows = self.rows[split]
        entries, batches = [], []
        for first in range(0, len(rows), self.cfg.batch_size):
            part = rows[first : first + self.cfg.batch_size]
            batch, more = self._decode(policy, part, first)
            if self.cfg.nll:
                more = [e | {"nll": nll} for e, nll in zip(more, policy.nll(part), strict=True)]
            batches.append(batch.with_(scores=scores_of(self.reward, batch)) if self.reward else batch)
            scores = [None] * len(batch) if batches[-1].scores is None else batches[-1].scores.tolist()
            for row, response, score, added in zip(batch.rows, batch.responses, scores, more, strict=True):
                entry = {"prompt": row["prompt"], "references": row["references"], "response": response}
                entries.append(entry | ({} if score is None else {"reward": score}) | added)
        if rows and not any(e["response"].strip() for e in entries):
            self.run.progress.say(
                f"warning: every response to the {split} rows is empty. Does the prompt look as in training?"
            )
        if entries and all(e.get("parse_failed") for e in entries):
            self.run.progress.say(
                f"warning: the model criticises itself in none of the {split} rows, so evaluate.protocol={self.cfg.protocol} gives "
                f"its first answers. Is it one of +algo=srt?"
            )
        if self.ranked:
            entries = [e | {"preference_accuracy": x} for e, x in zip(entries, self.ranked(split, rows), strict=True)]
        scored = _statistics(entries)
        if not scored.stats:
            raise UserError(
                "nothing to measure: the rows have no references and there is no reward. Set data.references."
            )
        return scored, entries, batches

    def _decode(self, policy: Policy, rows: list[Row], first: int) -> tuple[Batch, list[dict[str, Any]]]:
        """(the answers, what else there is to say of each)."""
        generator = self.run.generator(first, "evaluate")
        if self.cfg.protocol != "plain":
            return self._by_protocol(policy, rows, generator)
        if self.cfg.decode == "beam":
            return policy.beam(rows, self.cfg.beams, self.cfg.max_new_tokens), [{}] * len(rows)
        how = Decode(max_new_tokens=self.cfg.max_new_tokens, greedy=self.cfg.decode == "greedy")
        tau = torch.full((len(rows),), self.cfg.temperature)
        return policy.generate(rows, 1, how, temperature=tau, generator=generator), [{}] * len(rows)

    def _by_protocol(
        self, policy: Policy, rows: list[Row], generator: torch.Generator
    ) -> tuple[Batch, list[dict[str, Any]]]:
        found = answers(policy, rows, self.cfg, generator)
        batch = policy.demonstrations([{**row, "response": text} for row, text in zip(rows, found.texts, strict=True)])
        batch = batch.with_(rows=rows)
        more: list[dict[str, Any]] = [{k: values[i] for k, values in found.measured.items()} for i in range(len(rows))]
        for entry, text in zip(more, found.texts, strict=True):
            entry["characters"] = float(len(text))
        if found.first is None:
            return batch, more
        first = policy.answered(batch, found.first).with_(rows=rows)
        scores = scores_of(self.reward, first).tolist() if self.reward else [None] * len(rows)
        for entry, row, text, score in zip(more, rows, found.first, scores, strict=True):
            entry["first"] = text
            entry |= {"first_exact_match": float(text in row["references"])} if row["references"] else {}
            entry |= {} if score is None else {"first_reward": score}
        return batch, more


def picked(select: str, dev: dict[str, float]) -> float:
    """The value of the metric that ``evaluate.select`` names.

    Raises:
        UserError: these rows do not have it.
    """
    value = dev.get(f"dev/{select}")
    if value is None:
        names = [name.removeprefix("dev/") for name in dev]
        raise UserError(f"evaluate.select={select}: not measured on these rows.{suggest(select, names)}")
    return value


def run(cfg: DictConfig, run: Run, data: Data, algo: None, reward: Any) -> dict[str, Any]:
    """Evaluate a model on the test rows (dev, where there is no test) and write the table and the outputs."""
    held_out = HeldOut(cfg.evaluate, data, reward, run)
    split = "test" if held_out.rows["test"] else "dev"
    if not held_out.rows[split]:
        raise UserError("evaluate: the data have neither test nor dev rows. Set data.test.")
    policy = load(OmegaConf.to_object(cfg.model), cfg.seed)  # type: ignore[arg-type]
    if cfg.model.path and cfg.model.steer.value is None and (Path(resolve(cfg.model.path)) / "value.json").is_file():
        run.progress.say(
            f"warning: {cfg.model.path} is a value model, which was trained to add to another one's logits: measured alone it says "
            f"little. Put it beside one: alignkit evaluate MODEL model.steer.value={cfg.model.path}"
        )
    tables = held_out.test(policy, split, split)
    result = {
        "status": "finished", "stage": "evaluate", "name": cfg.name, "seed": cfg.seed, "model": cfg.model.path,
        "decode": OmegaConf.to_container(cfg.evaluate), "evaluation": tables, "signatures": metrics.signatures(),
        "seconds": {"evaluate": run.ledger["seconds/evaluate"]}, "directory": str(run.dir),
    }  # fmt: skip
    (run.dir / "table.md").write_text(table(tables), encoding="utf-8")
    run.write_json("result.json", result)
    return result


def table(columns: dict[str, Table]) -> str:
    """Markdown: a row per metric, a column per system, 95 % intervals in brackets."""
    names = list(next(iter(columns.values())))
    rows = {int(c["n"]) for c in next(iter(columns.values())).values() if "n" in c}
    lines = [f"| metric ({max(rows):,} rows) | " if rows else "| metric | "]
    lines = [lines[0] + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [cell(name, column[name]) if name in column else "" for column in columns.values()]
        lines.append(f"| {LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(result: dict[str, Any]) -> str:
    """What a finished run prints: the metrics before and after, time a phase, where the files are."""
    evaluation = result["evaluation"]
    after = evaluation.get("after", evaluation)
    columns = {"test before": evaluation["before"]["test"]} if evaluation.get("before") else {}
    for split, found in after.items():
        columns[
            {"test": "test after" if columns else "test", "difference": "difference (paired)"}.get(split, split)
        ] = found
    lines = ["", table(columns)] if columns else [""]
    seconds, peak = result.get("seconds", {}), result.get("peak_mb", {})
    if seconds:
        whole = sum(seconds.values())
        lines += ["| phase | seconds | share | peak MB |", "|---|---|---|---|"]
        lines += [f"| {k} | {v:.1f} | {v / whole:.0%} | {peak.get(k, 0):.0f} |" for k, v in seconds.items()]
        lines.append("")
    if result.get("samples"):
        tokens = ", ".join(f"{v:,} tokens {k}" for k, v in result["tokens"].items())
        lines.append(f"{result['steps']} steps, {result['samples']:,} samples, {tokens}.")
    if "dev/second" in result.get("training", {}):
        lines.append(f"second reward (audit.reward) of these weights on dev: {result['training']['dev/second']:.3f}.")
    lines += [alarm["text"] for alarm in result.get("audit", [])]
    lines.append(f"files: {result['directory']}")
    return "\n".join(lines)


MEASURED = (  # of an entry of the outputs: a number a row, whose mean is reported
    "reward", "preference_accuracy", "first_exact_match", "first_reward", "parse_failed", "tokens", "characters",
)  # fmt: skip


def cell(name: str, value: dict[str, float]) -> str:
    """A value with its interval, where it has one."""
    digits = 2 if name in PER_CENT else 3
    text = f"{value['value']:.{digits}f}"
    return text + (f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]" if "low" in value else "")


def _statistics(entries: list[dict[str, Any]]) -> metrics.Sentences:
    """Of the entries of the outputs."""
    return metrics.sentences(
        [e["response"] for e in entries],
        [e["references"] for e in entries],
        _measured(entries),
        [e["nll"] for e in entries] if entries and "nll" in entries[0] else None,
    )


def _measured(entries: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = [n for n in MEASURED if entries and n in entries[0]]
    return {n: [e[n] for e in entries] for n in names}


def _ones(rows: list[Row]) -> Any:
    import numpy as np

    return np.ones((1, len(rows)))
