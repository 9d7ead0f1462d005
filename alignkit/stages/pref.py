"""Stage ``pref``: learn from pairs of a better and a worse response, against a frozen start model or none."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit import ranks
from alignkit.algos._pref import Pref, Question, right
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Data, Row
from alignkit.loading import resolve
from alignkit.policy import Policy, load
from alignkit.run import Run, hash_weights
from alignkit.stages.evaluate import HeldOut
from alignkit.stages.fit import fit


def run(cfg: DictConfig, run: Run, data: Data, algo: Pref, reward: Any) -> dict[str, Any]:
    """Train on the judged responses of the training rows; measure held-out ones before, now and then, and after."""
    rows = algo.prepare(data.rows("train"), data.sides)
    model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
    policy = load(model, cfg.seed, data.texts(), run.checkpoint)
    policy.drop_dropout()  # the loss compares with a model that has none
    references = References(cfg, data, algo, {"train": rows})
    _tell_cut(policy, rows, data.sides, algo, run)

    held_out = HeldOut(cfg.evaluate, data, reward, run, partial(references.ranked, policy))
    return fit(run, policy, algo, rows, lambda part: references.batch(policy, "train", part), held_out, data.texts())


class References:
    """What the start model says of the rows' responses, above all their log-probabilities: asked once a split, kept on
    disk for all runs that share start model, rows and cut, below ``run.root``."""

    def __init__(self, cfg: DictConfig, data: Data, algo: Pref, rows: dict[str, list[Row]]) -> None:
        """``rows``: of splits whose rows the method has prepared."""
        self.cfg, self.data, self.algo, self.rows = cfg, data, algo, rows
        self.model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
        self.known: dict[tuple[str, str], Tensor] = {}  # (split, question) → (N, 2) or (N, 2, T), by the row's id

    def batch(self, policy: Policy, split: str, rows: list[Row]) -> Batch:
        """The responses of these rows, with ``extra["ref_logprob"]`` (B,) and what else the method asks."""
        batch = self._collate(policy, rows)
        questions = self._questions(split)
        if any((split, q.name) not in self.known for q in questions):
            self._learn(split, questions)
        extra = dict(batch.extra)
        for q in questions:
            found = self.known[split, q.name][[row["id"] for row in rows]].flatten(0, 1).to(batch.mask.device)
            extra[q.name] = found if found.dim() == 1 else found[:, : batch.mask.shape[1]]
        return batch.with_(extra=extra)

    @torch.no_grad()
    def ranked(self, policy: Policy, split: str, rows: list[Row]) -> list[float]:
        """Of a split's pairs, 1 where the policy ranks one as the data do, 0 where not, a half where it is even."""
        found: list[float] = []
        for first in range(0, len(rows), self.cfg.evaluate.batch_size):
            batch = self.batch(policy, split, rows[first : first + self.cfg.evaluate.batch_size])
            found += right(self.algo.margins(self.algo.pairs(policy, batch))).tolist()
        return found

    def _collate(self, policy: Policy, rows: list[Row]) -> Batch:
        collate = policy.judged if len(self.data.sides) == 1 else policy.pairs
        return collate(rows, self.algo.max_response_tokens, self.algo.end)

    def _questions(self, split: str) -> list[Question]:
        first = [Question("ref_logprob", self._logprob)] if self.algo.needs_reference else []
        return first + (self.algo.questions() if split == "train" else [])

    def _logprob(self, start: Policy, batch: Batch) -> Tensor:
        batch = batch.with_(extra={"row": torch.arange(len(batch), device=batch.mask.device)})
        summed = torch.zeros(len(batch))
        for piece, counts in ranks.dealt(ranks.split(batch, self.algo.micro_tokens)):
            if counts:
                summed[piece.extra["row"].cpu()] = (start.forward(piece) * piece.mask).sum(1).float().cpu()
        return ranks.summed(summed)

    def _learn(self, split: str, questions: list[Question]) -> None:
        """Fill ``known`` from the disk; what does not lie there is asked of the start model first."""
        root = Path(self.cfg.run.root) / "reference"
        files = [(q, root / f"{self._fingerprint(split, q)}.safetensors") for q in questions]
        missing = [
            (q, file)
            for (q, file), lacks in zip(files, ranks.agreed([not f.exists() for _, f in files]), strict=True)
            if lacks
        ]
        if missing:
            start = load(self.model, self.cfg.seed, self.data.texts())
            start.drop_dropout()
            root.mkdir(parents=True, exist_ok=True)
            for q, file in missing:
                found = self._answers(start, split, q)
                partial = file.with_suffix(f".{os.getpid()}.partial")  # jobs of a sweep may come here at the same time
                if ranks.first():
                    save_file({q.name: found}, partial)
                    partial.rename(file)
            ranks.barrier()
        for q, file in files:
            self.known[split, q.name] = load_file(file)[q.name]

    @torch.no_grad()
    def _answers(self, start: Policy, split: str, question: Question) -> Tensor:
        """(N, 2) or (N, 2, T) what the start model says of every response of a split."""
        rows, size = self.rows.get(split) or self.data.rows(split), len(self.data.sides)
        found: list[Tensor] = []
        for first in range(0, len(rows), 256):
            answer = question.answer(start, self._collate(start, rows[first : first + 256])).float().cpu()
            found.append(answer.view(-1, size, *answer.shape[1:]))
        width = max(part.shape[-1] for part in found)  # of (n, 2): 2 everywhere
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in found])

    def _fingerprint(self, split: str, question: Question) -> str:
        """Of what the numbers depend on: the start model's weights, how it computes, the rows and how they are rendered,
        and what is asked."""
        model: Any = OmegaConf.to_container(self.cfg.model, resolve=True)
        data: Any = OmegaConf.to_container(self.cfg.data, resolve=True)
        folder = Path(resolve(self.model.path)) if self.model.path else None
        parts = {
            "model": {k: v for k, v in model.items() if k not in ("path", "lora", "gradient_checkpointing")},
            "weights": hash_weights(folder) if folder and folder.is_dir() else self.model.path or self.cfg.seed,
            "data": {k: v for k, v in data.items() if k not in ("train", "dev", "test", "show", "limit")},
            "rows": self.data.fingerprint((split,)),
            "texts": self.data.fingerprint(("train",)) if not self.model.path else None,  # of the tokenizer
            "cut": self.algo.max_response_tokens,
            "end": self.algo.end,
            "count": len(self.data.rows(split)),
            "question": (question.name, *question.settings),
        }
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tell_cut(policy: Policy, rows: list[Row], sides: tuple[str, ...], algo: Pref, run: Run) -> None:
    """Say how many rows have a response that is cut, and how many pairs cannot be told apart any more."""
    limit = algo.max_response_tokens
    if limit is None:
        return
    encoded = list(
        zip(*(policy.encode_responses([row[side] for row in rows], algo.end) for side in sides), strict=True)
    )
    long = sum(max(map(len, each)) > limit for each in encoded)
    if not long:
        return
    what, more = "rows", ""
    if len(sides) == 2:
        same = sum(a[:limit] == b[:limit] for a, b in encoded)
        what, more = "pairs", f"; {same} pairs cannot be told apart then and teach nothing"
    run.progress.say(
        f"warning: {long} of {len(rows)} {what} have a response of more than algo.max_response_tokens={limit} tokens, "
        f"which is cut{more}."
    )
