"""Stage ``evaluate_classes``: how often a classifier is right on held-out rows, and how sure it was."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit import classifier, metrics
from alignkit.batch import Batch
from alignkit.classifier import Classifier
from alignkit.config import Evaluate
from alignkit.data import Data
from alignkit.errors import UserError
from alignkit.run import Run
from alignkit.stages.evaluate import Table, picked, table


class HeldOutClasses:
    """The dev and test rows, and what is measured of a classifier on them."""

    def __init__(self, cfg: Evaluate, data: Data, run: Run, teacher: Classifier | None = None) -> None:
        """``teacher``: how often the classifier says what it says is measured too."""
        self.cfg, self.run, self.teacher = cfg, run, teacher
        self.decoded: list[Batch] = []  # as a policy's held-out rows have it: a classifier writes nothing to be audited
        self._taught: dict[str, list[int | None]] = {}  # split → what the teacher says of its rows, asked once
        self.rows = {split: data.rows(split)[: cfg.rows] for split in ("dev", "test")}
        if not cfg.test:
            self.rows["test"] = []

    def dev(self, model: Classifier) -> dict[str, float]:
        """Dev metrics as ``dev/NAME``; empty where there are no dev rows."""
        if not self.rows["dev"]:
            return {}
        with self.run.phase("evaluate"):
            found = metrics.summary(self._stats(self._measure(model, "dev")), 0)
        return {f"dev/{name}": cell["value"] for name, cell in found.items()}

    def selected(self, dev: dict[str, float]) -> float:
        """The dev value that picks the best checkpoint."""
        return picked(self.cfg.select, dev)

    def test(self, model: Classifier, name: str, split: str = "test") -> dict[str, Table]:
        """Metrics of a split with intervals; writes ``outputs-{name}.jsonl``, a line a row."""
        if not self.rows[split]:
            return {}
        with self.run.phase("evaluate"):
            entries = self._measure(model, split)
        path = self.run.dir / f"outputs-{name}.jsonl"
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
        tables = {split: metrics.summary(self._stats(entries), self.cfg.bootstrap)}
        earlier = self.run.dir / "outputs-before.jsonl"
        if name == "after" and earlier.exists() and self.cfg.bootstrap:
            old = [json.loads(x) for x in earlier.read_text(encoding="utf-8").split("\n") if x]
            tables["difference"] = metrics.difference(self._stats(old), self._stats(entries), self.cfg.bootstrap)
        return tables

    def _measure(self, model: Classifier, split: str) -> list[dict[str, Any]]:
        rows = self.rows[split]
        wanted = model.demonstrations(rows).response_ids[:, 0].cpu()
        logprobs = model.logits(rows).log_softmax(-1)
        best = logprobs.argmax(-1)
        sure = logprobs.gather(1, best[:, None])[:, 0].exp()
        nll = -logprobs.gather(1, wanted[:, None])[:, 0]
        taught = self._taught.get(split, [None] * len(rows))
        if self.teacher is not None and split not in self._taught:
            taught = self._taught[split] = self.teacher.logits(rows).argmax(-1).tolist()
        return [
            {
                "prompt": row["prompt"],
                "label": row["response"],
                "response": model.labels[b],
                "probability": p,
                "accuracy": float(b == w),
                "label_nll": loss,
                **({} if t is None else {"agreement": float(t == b)}),
            }
            for row, b, p, w, loss, t in zip(
                rows, best.tolist(), sure.tolist(), wanted.tolist(), nll.tolist(), taught, strict=True
            )
        ]

    def _stats(self, entries: list[dict[str, Any]]) -> metrics.Sentences:
        names = [n for n in ("accuracy", "label_nll", "agreement") if n in entries[0]]
        return metrics.sentences([""] * len(entries), [[]] * len(entries), {n: [e[n] for e in entries] for n in names})


def run(cfg: DictConfig, run: Run, data: Data, algo: None, reward: Any) -> dict[str, Any]:
    """Measure a classifier on the test rows (dev, where there is no test); write the table and what it said."""
    held_out = HeldOutClasses(cfg.evaluate, data, run)
    split = "test" if held_out.rows["test"] else "dev"
    if not held_out.rows[split]:
        raise UserError("evaluate: the data have neither test nor dev rows. Set data.test.")
    model = classifier.load(OmegaConf.to_object(cfg.model), cfg.seed)  # type: ignore[arg-type]
    tables = held_out.test(model, split, split)
    result = {
        "status": "finished", "stage": "evaluate_classes", "name": cfg.name, "seed": cfg.seed, "model": cfg.model.path,
        "settings": OmegaConf.to_container(cfg.evaluate), "evaluation": tables,
        "seconds": {"evaluate": run.ledger["seconds/evaluate"]}, "directory": str(run.dir),
    }  # fmt: skip
    (run.dir / "table.md").write_text(table(tables), encoding="utf-8")
    run.write_json("result.json", result)
    return result
