"""Stage ``evaluate_rm``: how well a reward model ranks held-out responses, and how far that is length alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from alignkit import metrics, ranking, reward_model
from alignkit.batch import Batch
from alignkit.config import Evaluate
from alignkit.data import Data, Row
from alignkit.errors import UserError, suggest
from alignkit.reward_model import both_sides
from alignkit.rewards import of_texts, scores_of
from alignkit.run import Run
from alignkit.stages.evaluate import Table, picked, table


class HeldOutRewards:
    """The dev and test rows, and what is measured of a reward model on them."""

    def __init__(self, cfg: Evaluate, data: Data, run: Run, reward: Any = None) -> None:
        """``reward``: what tells how good candidates truly are, where the data do not."""
        self.cfg, self.run, self.reward = cfg, run, reward
        self.decoded: list[
            Batch
        ] = []  # as a policy's held-out rows have it: a reward model writes nothing to be audited
        self.rows = {split: data.rows(split)[: cfg.rows] for split in ("dev", "test")}
        if not cfg.test:
            self.rows["test"] = []

    def dev(self, model: Any) -> dict[str, float]:
        """Dev metrics as ``dev/NAME``; empty where there are no dev rows."""
        if not self.rows["dev"]:
            return {}
        with self.run.phase("evaluate"):
            tables = self._tables(*self._measure(model, "dev"), resamples=0)
        return {f"dev/{name}": cell["value"] for name, cell in tables.items()}

    def selected(self, dev: dict[str, float]) -> float:
        """The dev value that picks the best checkpoint."""
        return picked(self.cfg.select, dev)

    def test(self, model: Any, name: str, split: str = "test") -> dict[str, Table]:
        """Metrics of a split, with intervals where they are means over rows; writes ``outputs-{name}.jsonl``."""
        if not self.rows[split]:
            return {}
        with self.run.phase("evaluate"):
            stats, entries, whole = self._measure(model, split)
        path = self.run.dir / f"outputs-{name}.jsonl"
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
        tables = {split: self._tables(stats, entries, whole, self.cfg.bootstrap)}
        earlier = self.run.dir / "outputs-before.jsonl"
        if name == "after" and earlier.exists() and self.cfg.bootstrap and stats.stats:
            old = [json.loads(x) for x in earlier.read_text(encoding="utf-8").split("\n") if x]
            tables["difference"] = metrics.difference(self._stats(old), stats, self.cfg.bootstrap)
        return tables

    def _tables(self, stats: metrics.Sentences, entries: Any, whole: dict[str, float], resamples: int) -> Table:
        found = metrics.summary(stats, resamples) if stats.stats else {}
        return found | {name: {"value": value, "n": len(entries)} for name, value in whole.items()}

    def _measure(self, model: Any, split: str) -> tuple[metrics.Sentences, list[dict[str, Any]], dict[str, float]]:
        """(sums over rows, an entry a row, what is no mean over rows)."""
        rows = self.rows[split]
        if "chosen" in rows[0]:
            return self._measure_pairs(model, rows)
        if "ratings" in rows[0]:
            return self._measure_ratings(model, rows)
        if "candidates" in rows[0]:
            return self._measure_lists(model, rows)
        raise UserError(
            "nothing to measure: the held-out rows have no pairs, ratings or candidates. Set data.chosen, data.ratings or "
            "data.candidates."
        )

    def _measure_pairs(self, model: Any, rows: list[Row]) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
        scores = None
        if model.scalar:
            scores = model.score(both_sides(rows))
            margins = ((scores[0::2] - scores[1::2]).double() * model.std / model.reading.temperature).tolist()
        else:
            margins = torch.logit(model.compare(rows), eps=1e-12).tolist()
        entries = []
        for i, (row, margin) in enumerate(zip(rows, margins, strict=True)):
            entry = {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "margin": margin}
            if scores is not None:
                entry |= {"score_chosen": float(scores[2 * i]), "score_rejected": float(scores[2 * i + 1])}
            if self.cfg.section:
                entry["section"] = _section(row, self.cfg.section)
            entries.append(entry)
        whole = {"margin_max": max(margins), "margin_sd": float(np.std(margins))}
        if scores is not None:
            lengths = [len(row["response"]) for row in both_sides(rows)]
            whole["score_sd"] = float(scores.std()) * model.std
            whole["length_spearman"] = float(ranking.spearman(scores.numpy(), np.array(lengths, dtype=float)))
        return self._stats(entries), entries, whole

    def _measure_ratings(self, model: Any, rows: list[Row]) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
        found = model.ratings(rows)
        entries = [
            {
                "prompt": row["prompt"],
                "response": row["response"],
                "ratings": row["ratings"],
                "predicted": one,
            }
            for row, one in zip(rows, found, strict=True)
        ]
        whole: dict[str, float] = {}
        for name in found[0]:
            both = [(e["predicted"][name], e["ratings"][name]) for e in entries if e["ratings"].get(name) is not None]
            if len(both) > 1:
                a, b = np.array(both, dtype=float).T
                whole |= {
                    f"pearson/{name}": float(ranking.pearson(a, b)),
                    f"spearman/{name}": float(ranking.spearman(a, b)),
                }
        known = [v for k, v in whole.items() if k.startswith("pearson/") and v == v]  # not where either is constant
        whole["correlation"] = float(np.mean(known)) if known else 0.0
        return self._stats(entries), entries, whole

    def _measure_lists(self, model: Any, rows: list[Row]) -> tuple[Any, list[dict[str, Any]], dict[str, float]]:
        """How the model ranks each prompt's candidates, against their true scores or what ``reward`` gives them."""
        every = [[{**row, "response": text} for text in row["candidates"]] for row in rows]
        scores = iter(model.score([one for each in every for one in each]).tolist())
        entries = []
        for row, each in zip(rows, every, strict=True):
            if self.reward is not None:
                golden = scores_of(self.reward, of_texts(each)).tolist()
            elif row["golden"] is not None:
                golden = row["golden"]
            else:
                raise UserError("candidates have no true scores. Set data.golden, or a reward that gives them.")
            entries.append(
                {
                    "prompt": row["prompt"],
                    "candidates": row["candidates"],
                    "golden": golden,
                    "scores": [next(scores) for _ in each],
                }
            )
        return self._stats(entries), entries, {}

    def _stats(self, entries: list[dict[str, Any]]) -> metrics.Sentences:
        if "margin" in entries[0]:
            lengths = [(len(e["chosen"]), len(e["rejected"])) for e in entries]
            sections = [e["section"] for e in entries] if "section" in entries[0] else None
            prompts = [json.dumps(e["prompt"]) for e in entries]
            return metrics.pairs([e["margin"] for e in entries], lengths, prompts, sections)
        if "candidates" in entries[0]:
            return metrics.Sentences(metrics.per_prompt([list_metrics(e["golden"], e["scores"]) for e in entries]))
        squares = [
            [(e["predicted"][k] - v) ** 2 for k, v in e["ratings"].items() if v is not None and k in e["predicted"]]
            for e in entries
        ]
        errors = [float(np.mean(one)) for one in squares if one]  # of the rows that have a rating
        return metrics.sentences([""] * len(errors), [[]] * len(errors), {"error": errors} if errors else {})


def list_metrics(golden: list[float], scores: list[float]) -> dict[str, float]:
    """How one prompt's candidates are ranked, and the true score of the best of n drawn from them: by the model, by itself, by chance."""
    g, s = np.array(golden), np.array(scores)
    found = {
        "pair_accuracy": ranking.pair_accuracy(g, s), "pearson": ranking.pearson(g, s), "spearman": ranking.spearman(g, s),
        "kendall": ranking.kendall(g, s), "ndcg": ranking.ndcg(g, s), "mrr": ranking.mrr(g, s),
    }  # fmt: skip
    found = {f"list/{name}": float(value) for name, value in found.items()}
    for n in (1, 2, 4, 8, 16):
        if n <= len(g):
            found |= {
                f"best_of/{n}": float(ranking.best_of(g, s, n)),
                f"best_of_gold/{n}": float(ranking.best_of(g, g, n)),
                f"best_of_random/{n}": float(g.mean()),  # of the same prompts: those with n candidates
            }
    return found


def _section(row: Row, column: str) -> str:
    if column not in row:
        raise UserError(f"row {row['id']}: no column '{column}', which evaluate.section names.{suggest(column, row)}")
    return str(row[column])


def run(cfg: DictConfig, run: Run, data: Data, algo: None, reward: Any) -> dict[str, Any]:
    """Measure a reward model on the test rows (dev, where there is no test); write the table and every margin."""
    held_out = HeldOutRewards(cfg.evaluate, data, run, reward)
    split = "test" if held_out.rows["test"] else "dev"
    if not held_out.rows[split]:
        raise UserError("evaluate: the data have neither test nor dev rows. Set data.test.")
    model = reward_model.load(cfg.model.path, cfg.model.device, cfg.model.compute)
    model.check()
    tables = held_out.test(model, split, split)
    result = {
        "status": "finished", "stage": "evaluate_rm", "name": cfg.name, "seed": cfg.seed, "model": cfg.model.path,
        "settings": OmegaConf.to_container(cfg.evaluate), "evaluation": tables,
        "seconds": {"evaluate": run.ledger["seconds/evaluate"]}, "directory": str(run.dir),
    }  # fmt: skip
    (run.dir / "table.md").write_text(table(tables), encoding="utf-8")
    run.write_json("result.json", result)
    return result
