"""Stage ``pref``: learn from pairs of a better and a worse response, against a frozen start model or none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.algos._pref import Pref, right
from alignkit.batch import Batch
from alignkit.config import Model
from alignkit.data import Data, Row
from alignkit.loading import resolve
from alignkit.policy import Policy, load
from alignkit.run import Run, hash_weights
from alignkit.stages.evaluate import HeldOut
from alignkit.stages.fit import fit


def run(cfg: DictConfig, run: Run, data: Data, algo: Pref, reward: Any) -> dict[str, Any]:
    """Train on the pairs of the training rows; measure held-out pairs and responses before, now and then, and after."""
    rows = data.rows("train")
    model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
    policy = load(model, cfg.seed, data.texts(), run.checkpoint)
    policy.drop_dropout()  # the loss compares with a model that has none
    references = References(cfg, data, algo)
    _tell_cut(policy, rows, algo, run)

    def collate(split: str, part: list[Row]) -> Batch:
        return references.add(split, part, policy.pairs(part, algo.max_response_tokens))

    @torch.no_grad()
    def ranked(split: str, part: list[Row]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(part), cfg.evaluate.batch_size):
            batch = collate(split, part[first : first + cfg.evaluate.batch_size])
            found += right(algo.margins(algo.pairs(policy, batch))).tolist()
        return found

    held_out = HeldOut(cfg.evaluate, data, reward, run, ranked)
    return fit(run, policy, algo, rows, lambda part: collate("train", part), held_out, data.texts())


class References:
    """The start model's log-probabilities of whole responses: computed once a split, kept on disk for all runs that share
    start model, rows and cut, below ``run.root``."""

    def __init__(self, cfg: DictConfig, data: Data, algo: Pref) -> None:
        self.cfg, self.data, self.algo = cfg, data, algo
        self.model: Model = OmegaConf.to_object(cfg.model)  # type: ignore[assignment]
        self.known: dict[str, Tensor] = {}  # split → (N, 2), by the row's id

    def add(self, split: str, rows: list[Row], batch: Batch) -> Batch:
        """The batch of these rows' pairs with ``extra["ref_logprob"]`` (B,), where the method reads it."""
        if not self.algo.needs_reference:
            return batch
        if split not in self.known:
            self.known[split] = self._read(split)
        found = self.known[split][[row["id"] for row in rows]].flatten().to(batch.mask.device)
        return batch.with_(extra={**batch.extra, "ref_logprob": found})

    def _read(self, split: str) -> Tensor:
        file = Path(self.cfg.run.root) / "reference" / f"{self._fingerprint(split)}.safetensors"
        if file.exists():
            return load_file(file)["logprobs"]
        start = load(self.model, self.cfg.seed, self.data.texts())
        start.drop_dropout()
        rows = self.data.rows(split)
        found = torch.zeros(len(rows), 2)
        for first in range(0, len(rows), 256):
            part = rows[first : first + 256]
            batch = start.pairs(part, self.algo.max_response_tokens)
            batch = batch.with_(extra={"row": torch.arange(len(batch), device=batch.mask.device)})
            summed = torch.zeros(len(batch))
            with torch.no_grad():
                for piece in batch.split(self.algo.micro_tokens):
                    summed[piece.extra["row"].cpu()] = (start.forward(piece) * piece.mask).sum(1).float().cpu()
            found[first : first + len(part)] = summed.view(-1, 2)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")  # jobs of a sweep may come here at the same time
        save_file({"logprobs": found}, partial)
        partial.rename(file)
        return found

    def _fingerprint(self, split: str) -> str:
        """Of what the numbers depend on: the start model's weights, how it computes, the rows and how they are rendered."""
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
            "count": len(self.data.rows(split)),
        }
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tell_cut(policy: Policy, rows: list[Row], algo: Pref, run: Run) -> None:
    """Say how many pairs have a response that is cut, and how many cannot be told apart any more."""
    limit = algo.max_response_tokens
    if limit is None:
        return
    chosen, rejected = (policy.encode_responses([row[side] for row in rows]) for side in ("chosen", "rejected"))
    long = sum(max(len(a), len(b)) > limit for a, b in zip(chosen, rejected, strict=True))
    same = sum(a[:limit] == b[:limit] for a, b in zip(chosen, rejected, strict=True))
    if long:
        run.progress.say(
            f"warning: {long} of {len(rows)} pairs have a response of more than algo.max_response_tokens={limit} tokens, "
            f"which is cut; {same} pairs cannot be told apart then and teach nothing."
        )
