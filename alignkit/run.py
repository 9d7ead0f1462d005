"""A run: its directory, its record, its checkpoints, and *the* optimizer step."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from alignkit import __version__, adamw, preflight, ranks
from alignkit.audit import Audit
from alignkit.batch import Batch, Loss
from alignkit.config import same_settings, same_sources, signature, whole
from alignkit.data import Row
from alignkit.errors import Stopped, UserError
from alignkit.files import as_lines, write_atomically
from alignkit.progress import Progress
from alignkit.reader import compute_in, layers_of
from alignkit.rewards import Reward
from alignkit.tracking import Tracker

TWICE = 0.5  # seconds within which two signals are one: a scheduler may tell a process what its parent hands on to it
TRAINING = (
    "loss",
    "reward",
    "kl",
    "length",
    "margin",
    "preference_accuracy",
    "dev/second",
)  # of the last step, in result.json


class Run:
    """The directory ``cfg.run.dir`` and all that is written into it.

    A step depends on (weights, optimizer, seed, step number) and on the algorithm's saved state only: rows are
    drawn by index and generators are seeded from (seed, step), so a stopped run ends bit for bit where an
    unbroken one does (for an equal number of threads).
    """

    def __init__(
        self, cfg: DictConfig, fingerprint: dict[str, str], command: list[str], second: Reward | None = None
    ) -> None:
        """``second``: the reward that the audit alone sees."""
        self.cfg = cfg
        self.audit = Audit(OmegaConf.to_object(cfg.audit), second)  # type: ignore[arg-type]
        self.home = self.dir = Path(cfg.run.dir)
        self.seed: int = cfg.seed
        self.ledger: dict[str, float] = {}
        self.resumes = 0
        self.added: dict[str, Any] = {}  # what the stage adds to result.json
        self.best: dict[str, float] | None = None  # {"step": …, "value": …} on dev
        self.before: dict[str, Any] | None = None  # evaluation before training
        self.state: dict[str, Any] = {}  # of the checkpoint that is resumed
        self.stop_asked = False
        self.ended_by = "algo.steps"  # the setting that set the end
        self._seen: dict[str, float] = {}  # the ledger when `speed` was last asked
        self._inside = 0.0  # seconds of the phases within the present one
        self._shape = ""  # of what the present phase works at, in words
        self._order: tuple[int, int, list[int]] = (-1, -1, [])
        self.shards: Any = None  # of the weights, where several ranks share them
        _keep_freed_memory()
        if ranks.first():
            self.home.mkdir(parents=True, exist_ok=True)
        self.checkpoint = ranks.agreed(self._latest())
        begun = self._state_file()
        if begun.exists():
            self._read_state(begun, fingerprint)
            self._seen = dict(self.ledger)
        if not ranks.first():  # what every rank writes alike, the first one's is kept of; ``close`` takes this one away
            self.dir = Path(tempfile.mkdtemp(prefix="alignkit-"))
        self._drop_later_steps()
        self._start_record(fingerprint, command)
        self.progress = Progress(f"{cfg.name} s{cfg.seed}")
        self.tracker = Tracker(cfg, self.dir, on=ranks.first())

    def close(self) -> None:
        """Close the bar and the tracker, however the run ended."""
        self.progress.close()
        self.tracker.finish()
        ranks.go_in_step(False)
        if self.dir != self.home:
            shutil.rmtree(self.dir, ignore_errors=True)

    # ---- drawing -------------------------------------------------------------------------------------------

    def draw(self, rows: list[Row], count: int, step: int) -> list[Row]:
        """The ``count`` rows of ``step``: a fresh permutation each epoch, found by position, no cursor to lose."""
        drawn = []
        for position in range(step * count, (step + 1) * count):
            epoch, index = divmod(position, len(rows))
            if self._order[:2] != (epoch, len(rows)):
                order = torch.randperm(len(rows), generator=self.generator(epoch, "order")).tolist()
                self._order = (epoch, len(rows), order)
            drawn.append(rows[self._order[2][index]])
        return drawn

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """A generator that depends on the seed, the step and what it is for, and on nothing else."""
        return torch.Generator().manual_seed(self._seed(step, purpose))

    def seed_globally(self, step: int) -> None:
        """Seed torch's own generator, which dropout draws from, on each rank anew."""
        torch.manual_seed(self._seed(step, "global" if ranks.first() else f"global/{ranks.rank()}"))

    def _seed(self, step: int, purpose: str) -> int:
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    # ---- the loop's frame ----------------------------------------------------------------------------------

    def optimizer(self, policy: Any, algo: Any, steps: int, fresh: bool = False) -> torch.optim.Optimizer:
        """Fused AdamW over what is trained, a group for the model, a critic and what stands beside it, with the state of the
        checkpoint that is resumed (unless ``fresh``)."""
        if algo.warmup >= steps and not fresh:  # said before
            print(f"warning: algo.warmup={algo.warmup} is not shorter than the run ({steps} steps).", file=sys.stderr)
        modules = [module for module in (policy.model, policy.critic, policy.beside) if module]
        ranks.begin_alike([x for module in modules for x in (*module.parameters(), *module.buffers())])
        reader = getattr(policy, "policy", policy)  # a comparator asks a policy
        if self.cfg.run.shard and ranks.size() > 1:
            from alignkit.sharding import Shards

            reader.shards = self.shards = Shards(modules, reader.compute)
        elif self.cfg.model.gradient_checkpointing:
            for layer in layers_of(modules):
                compute_in(layer, reader.compute)
        own = self.shards.own if self.shards else lambda p: p
        groups = [{"params": [own(p) for p in module.parameters() if p.requires_grad]} for module in modules]
        made = adamw.Offloaded if self.cfg.run.offload else torch.optim.AdamW
        optimizer = made(groups, lr=algo.lr, betas=tuple(algo.betas), weight_decay=algo.weight_decay, fused=True)
        if self.checkpoint and not fresh:
            with self.reading():
                adamw.load(optimizer, self.shards, self.checkpoint / "state")
        return optimizer

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """Show the bar; turn the first Ctrl-C or SIGTERM into a stop after the step, a later one into one at once."""
        asked = 0.0

        def ask(signum: int, frame: Any) -> None:
            nonlocal asked
            if self.stop_asked:
                if time.monotonic() - asked > TWICE:
                    raise KeyboardInterrupt
                return
            self.stop_asked, asked = True, time.monotonic()
            self.progress.say("stopping after this step (again: at once) …")

        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        at = f"goes on after step {self.first_step} of {steps}" if self.first_step else f"{steps} steps"
        self.progress.say(f"{self.home}: {at}")
        self.progress.start(self.first_step, steps)
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
            self.progress.close()

    def begin(self, policy: Any, optimizer: Any, algo: Any, held_out: Any) -> None:
        """What comes before the first step: the test rows, and dev, where the start may turn out to be the best."""
        self.before = held_out.test(policy, "before")
        dev = held_out.dev(policy) if self.cfg.evaluate.every else {}
        if dev:
            self._improved(0, held_out.selected(dev))
            self.log(0, {**self.look(0, held_out.decoded, "dev/"), **dev})
            self.progress.say("before: " + " ".join(f"{k} {v:.4g}" for k, v in dev.items()))
            self.save(0, policy, optimizer, algo.state())

    def end_step(
        self, done: int, steps: int, metrics: dict[str, float], policy: Any, optimizer: Any, algo: Any, held_out: Any
    ) -> None:
        """What follows a step, ``done`` steps being finished: dev evaluation, log, checkpoint, stop where asked.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, with the state saved.
        """
        every = self.cfg.evaluate.every
        better = False
        if every and (done % every == 0 or done == steps):
            dev = held_out.dev(policy)
            metrics = {**metrics, **self.look(done, held_out.decoded, "dev/"), **dev}
            better = bool(dev) and self._improved(done, held_out.selected(dev))
        self.log(done, metrics)
        stopping = ranks.any_of(self.stop_asked)  # read once: a signal that comes while saving waits for the next step
        if better or stopping or done % self.cfg.run.save_every == 0 or done == steps:
            self.save(done, policy, optimizer, algo.state())
        if stopping and done < steps:
            raise Stopped(f"stopped after step {done}, saved in {self.home}/checkpoint-{done}.")

    # ---- the optimizer step --------------------------------------------------------------------------------

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Batch], Loss],
        parts: list[Batch],
        max_grad_norm: float,
        step: int,
        rates: list[float],
    ) -> dict[str, float]:
        """One optimizer step at ``rates``, one a parameter group, on the mean over all parts: sums are accumulated, then
        divided once; each group's gradient is clipped by itself.

        Raises:
            UserError: a loss or gradient that is not finite; the weights are not touched.
        """
        total, count = 0.0, 0.0
        metrics: dict[str, float] = {}
        sums = []
        if self.shards:
            self.shards.apart()
        own = ranks.dealt(parts)  # of several ranks one may have none
        with ranks.alone():
            for part, counts in own:
                self._shape = preflight.shape_of(part)
                one = loss(part)
                (one.total if counts else one.total * 0).backward()
                if counts:
                    sums.append((float(one.total.detach()), one.count, one.metrics))
        for loss_sum, counted, means in (one for each in ranks.together(sums) for one in each):
            total, count = total + loss_sum, count + counted
            for name, value in means.items():
                metrics[name] = metrics.get(name, 0.0) + value * counted
        if self.shards:
            self.shards.take_gradients()
        is_part = self.shards.is_part if self.shards else lambda p: False
        ranks.sum_gradients([p for group in optimizer.param_groups for p in group["params"] if not is_part(p)])
        count = count or 1.0
        norms = []
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.grad.div_(count)
            length = torch.nn.utils.get_total_norm([p.grad for p in parameters if not is_part(p)])
            if self.shards:
                of_parts = torch.nn.utils.get_total_norm([p.grad for p in parameters if is_part(p)])
                length = (length**2 + ranks.summed(of_parts**2)).sqrt()
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm or math.inf, length)
            norms.append(float(length))
        norm = norms[0] if all(map(math.isfinite, norms)) else math.nan
        if not math.isfinite(total) or not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            last = self._latest()
            raise UserError(
                f"step {step}: the {'loss' if not math.isfinite(total) else 'gradient'} is not finite; the weights of "
                f"this step were not changed. "
                + (f"The last good state is {last}. " if last else "")
                + "Lower algo.lr, warm up longer, or look at the rows of this step."
            )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # now: the next sampling has a use for the memory
        return {"loss": total / count, "grad_norm": norm, **{k: v / count for k, v in metrics.items()}}

    # ---- the ledger ----------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, shape: str = "") -> Iterator[None]:
        """Count the seconds and the peak memory of a phase (``sample``, ``score``, ``update``, ``evaluate``).

        The seconds of a phase within another count for the inner one alone; of several ranks the first one's count.

        Args:
            shape: what it works at, for the message when the memory is too small; an update tells its own.

        Raises:
            UserError: the memory is too small.
        """
        ranks.watch()
        _reset_peak()
        start, outer = time.perf_counter(), self._inside
        self._inside, self._shape = 0.0, shape
        try:
            yield
        except (MemoryError, RuntimeError, OSError) as e:
            if not preflight.out_of_memory(e):
                raise
            raise UserError(preflight.too_large(self, name, self._shape, e)) from None
        spent = time.perf_counter() - start
        self.count(f"seconds/{name}", spent - self._inside)
        self._inside = outer + spent
        key = f"peak_mb/{name}"
        self.ledger[key] = max(self.ledger.get(key, 0.0), _peak_mb())
        ranks.watch()

    def count(self, name: str, amount: float) -> None:
        """Add to a running sum of the ledger, such as ``tokens/sampled``."""
        self.ledger[name] = self.ledger.get(name, 0.0) + amount

    def speed(self) -> dict[str, float]:
        """Seconds and share of each phase, and sampled tokens a second, since the last call."""
        spent = {k: v - self._seen.get(k, 0.0) for k, v in self.ledger.items()}
        self._seen = dict(self.ledger)
        seconds = {p: spent.get(f"seconds/{p}", 0.0) for p in ("sample", "score", "update")}
        whole = sum(seconds.values()) or 1.0
        shares = {f"share/{p}": s / whole for p, s in seconds.items()}
        return {**shares, "step_seconds": whole, "tokens_per_second": spent.get("tokens/sampled", 0.0) / whole}

    def look(self, step: int, batches: list[Batch], where: str = "") -> dict[str, float]:
        """What the audit finds in samples, or in dev responses (``where="dev/"``); an alarm is said when it first rings."""
        if not self.cfg.audit.on or self.cfg.stage != "rl" or not batches:
            return {}
        with self.phase("evaluate" if where else "score"):
            found = self.audit.look(step, batches, where)
        for text in self.audit.new:
            self.progress.say(text)
        return found

    # ---- the record ----------------------------------------------------------------------------------------

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl`` (step counts finished steps) and pass it to wandb and the screen."""
        line = {"step": step, **metrics, **self.ledger}
        _append(self.dir / "metrics.jsonl", line)
        self.tracker.log(step, line)
        self.progress.show(step, metrics)

    def samples(self, step: int, batch: Batch, limit: int = 16) -> None:
        """Append prompts, references, responses and scores of a step to ``samples.jsonl``."""
        ringing = {"audit": self.audit.ringing} if self.audit.ringing else {}
        for i in range(min(len(batch), limit)):
            row = batch.rows[i]
            entry = {
                "step": step,
                "prompt": row["prompt"],
                "references": row["references"],
                "response": batch.responses[i],
                "score": None if batch.scores is None else float(batch.scores[i]),
            }
            _append(self.dir / "samples.jsonl", entry | ringing)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of the run directory whole or not at all."""
        write_atomically(self.dir / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def keep(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor that depends on this run's settings and data alone: computed once, and read from its directory at every
        later start."""
        key = hashlib.sha256(f"{signature(self.cfg)} {self.fingerprint}".encode()).hexdigest()[:8]
        file = self.home / f"{name}-{key}.safetensors"
        if not ranks.agreed(file.exists()):
            found = compute().contiguous()
            partial = file.with_name(file.name + ".partial")
            ranks.each(lambda: (save_file({name: found}, partial), partial.rename(file)) if ranks.first() else None)
        return load_file(file)[name]

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _improved(self, step: int, value: float) -> bool:
        # training that has not hurt is kept: an even score takes the start's place
        if self.best is None or value > self.best["value"] or (value == self.best["value"] and not self.best["step"]):
            self.best = {"step": step, "value": value}
            return True
        return False

    def save(
        self,
        step: int,
        policy: Any,
        optimizer: torch.optim.Optimizer,
        algo_state: dict[str, Any],
        tensors: dict[str, Any] | None = None,
    ) -> None:
        """Write ``checkpoint-{step}``: a plain model folder and ``state/``; keep the last few and the best.

        Args:
            tensors: what of the algorithm's state is no JSON: ``state/algo.pt``.
        """
        target = self.home / f"checkpoint-{step}"
        if ranks.agreed(target.exists()):
            return
        if self.shards:
            self.shards.whole()
        learned, own = adamw.state_of(optimizer, self.shards)
        moments = []
        if self.shards:
            file = self.home / f"{target.name}.moments.partial" / adamw.own_name()
            moments = ranks.together(file)
            ranks.each(lambda: self._save_own(own, file, target))
        ranks.each(
            lambda: self._save(target, step, policy, learned, moments, algo_state, tensors) if ranks.first() else None
        )

    def _save_own(self, own: dict[str, torch.Tensor], file: Path, target: Path) -> None:
        with self._told(target):
            file.parent.mkdir(exist_ok=True)
            save_file(own, file)

    def _save(
        self,
        target: Path,
        step: int,
        policy: Any,
        learned: dict[str, Any],
        moments: list[Path],
        algo_state: dict[str, Any],
        tensors: dict[str, Any] | None,
    ) -> None:
        state = self._state(step, algo_state)
        with self.folder(target) as partial:
            policy.save(partial)
            (partial / "state").mkdir()
            torch.save(learned, partial / "state" / "optimizer.pt")
            for file in moments:
                if not file.exists():
                    raise OSError(
                        f"{file.name}, of another process, is not there: run.root must lie where all machines see it"
                    )
                file.rename(partial / "state" / file.name)
            if moments:
                moments[0].parent.rmdir()
            if policy.critic is not None:
                save_model(policy.critic, str(partial / "state" / "critic.safetensors"))
            if policy.beside is not None:
                save_model(policy.beside, str(partial / "state" / "beside.safetensors"))
            if tensors is not None:
                torch.save(tensors, partial / "state" / "algo.pt")
            (partial / "state" / "run.json").write_text(json.dumps(state), encoding="utf-8")
        self._prune()

    def save_part(self, done: int, rows: list[Row]) -> None:
        """Write the rows of part ``done`` of a stage that makes a data set, and that parts 1 to ``done`` are there.

        Raises:
            UserError: the disk is full, or cannot be written.
        """
        folder = self.dir / "parts"
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{done:06d}.jsonl", as_lines(rows))
            write_atomically(folder / "run.json", json.dumps(self._state(done, {})))
        except OSError as e:
            raise UserError(
                f"part {done} in {folder} could not be written ({e.strerror}). The parts before it are whole: free some space and "
                "repeat the command to go on."
            ) from None

    def parts(self, count: int) -> list[Row]:
        """The rows of parts 1 to ``count``, in order."""
        files = [self.dir / "parts" / f"{i + 1:06d}.jsonl" for i in range(count)]
        return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]

    def _state(self, step: int, algo_state: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": step,
            "signature": signature(self.cfg),
            "algo": algo_state,
            "audit": self.audit.state(),
            "ledger": self.ledger,
            "best": self.best,
            "before": self.before,
            "fingerprint": self.fingerprint,
            "threads": torch.get_num_threads(),
        }

    @contextmanager
    def folder(self, target: Path) -> Iterator[Path]:
        """A folder to fill that is renamed to ``target`` when it is complete, so that ``target`` is whole or absent.

        Raises:
            UserError: the disk is full or the folder cannot be written; what was there before is left alone.
        """
        partial = target.with_name(target.name + ".partial")
        with self._told(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

    @contextmanager
    def _told(self, target: Path) -> Iterator[None]:
        """Say what is left where ``target`` cannot be written."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as e:  # torch reports a full disk as a RuntimeError
            for left in target.parent.glob(f"{target.name}.*partial"):
                shutil.rmtree(left, ignore_errors=True)
            kept = self._latest()
            if isinstance(e, NotImplementedError):
                raise
            raise UserError(
                f"{target} could not be written ({(str(e).splitlines() or [type(e).__name__])[0]}). "
                + (f"{kept.name} is whole: free" if kept else "Free")
                + " some space and repeat the command to go on."
            ) from None

    @property
    def first_step(self) -> int:
        """The step that comes next: 0, or what the checkpoint says."""
        return int(self.state.get("step", 0))

    def finish(self, policy: Any, steps: int, held_out: Any) -> dict[str, Any]:
        """Evaluate the last or best weights, write ``final/`` with its card, then ``result.json``: the run is finished."""
        weights_of = steps
        if self.cfg.evaluate.final == "best" and self.best and self.best["step"] != steps:
            best = self.home / f"checkpoint-{self.best['step']}"
            if not best.is_dir():
                raise UserError(
                    f"{best}, the best on dev, is gone. Restore it, or take the last with evaluate.final=last."
                )
            if self.shards:
                self.shards.whole()  # and so it stays
            policy.restore(best)
            if not self.best["step"]:
                self.progress.say(
                    "the start is the best on dev, so final/ holds it; evaluate.final=last takes the end."
                )
            weights_of = int(self.best["step"])
        after = held_out.test(policy, "after")
        if self.shards:
            self.shards.whole()
        result: dict[str, Any] = ranks.each(
            lambda: self._final(policy, steps, weights_of, after) if ranks.first() else {}
        )[0]
        self.write_json("result.json", result)
        self.tracker.finish(result)
        return result

    def _final(self, policy: Any, steps: int, weights_of: int, after: dict[str, Any]) -> dict[str, Any]:
        with self.folder(self.dir / "final") as folder:
            policy.export(folder)
            result = self._result(steps, after, hash_weights(folder)) | {"training": self._training_of(weights_of)}
            (folder / "README.md").write_text(model_card(self.cfg, result), encoding="utf-8")
        return result

    def _training_of(self, step: int) -> dict[str, float]:
        """What was logged of the training step that gave the final weights."""
        lines = (self.dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        found = [line for line in map(json.loads, filter(None, lines)) if line["step"] == step]
        return {k: v for line in found for k, v in line.items() if k in TRAINING}

    def _result(self, steps: int, after: dict[str, Any], weights: str) -> dict[str, Any]:
        return {
            "status": "finished",
            "stage": self.cfg.stage,
            "name": self.cfg.name,
            "seed": self.seed,
            "signature": signature(self.cfg),
            "weights_sha256": weights,
            "evaluation": {"before": self.before, "after": after},
            "steps": steps,
            "ended_by": self.ended_by,
            "best": self.best,
            "audit": self.audit.alarms,
            "samples": int(self.ledger.get("samples", 0)),
            "tokens": {k.removeprefix("tokens/"): int(v) for k, v in self.ledger.items() if k.startswith("tokens/")},
            "seconds": _under(self.ledger, "seconds/"),
            "peak_mb": _under(self.ledger, "peak_mb/"),
            "resumes": self.resumes,
            "directory": str(self.home),
            **self.added,
        }

    def _latest(self) -> Path | None:
        saved = [
            p for p in self.home.glob("checkpoint-*") if p.suffix != ".partial" and (p / "state" / "run.json").exists()
        ]
        return max(saved, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def _prune(self) -> None:
        saved = sorted(self.home.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2]))
        best = f"checkpoint-{self.best['step']}" if self.best else None
        for path in saved[: -self.cfg.run.keep]:
            if path.name != best:
                shutil.rmtree(path, ignore_errors=True)

    def _state_file(self) -> Path:
        """Where the state of an unfinished run lies: in its last checkpoint, or beside the parts of its rows."""
        return (self.checkpoint / "state" if self.checkpoint else self.dir / "parts") / "run.json"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what is read of the state of the run that goes on.

        Raises:
            UserError: it is damaged; says what to delete.
        """
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
            if preflight.out_of_memory(e):
                raise
            folder = self.checkpoint or self.home / "parts"
            earlier = [p for p in self.home.glob("checkpoint-*[0-9]") if self.checkpoint and p != self.checkpoint]
            on = "go on from the one before" if earlier else "start from the beginning"
            raise UserError(
                f"{folder} is damaged: {(str(e).splitlines() or [type(e).__name__])[0][:160]}. Delete it to {on}, by the same command."
            ) from None

    def _read_state(self, file: Path, fingerprint: dict[str, str]) -> None:
        with self.reading():
            self.state = json.loads(file.read_text(encoding="utf-8"))
        same_settings(self.dir, self.state["signature"], self.cfg)
        same_sources(self.dir, self.state["fingerprint"], fingerprint, self.cfg)
        self.ledger, self.best, self.before = self.state["ledger"], self.state["best"], self.state["before"]
        self.audit.load_state(self.state.get("audit", {}))

    def _drop_later_steps(self) -> None:
        """Steps after the checkpoint are done again, so their lines go."""
        step = self.first_step if self.state else -1
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.dir / name
            if path.exists():
                lines = [x for x in path.read_text(encoding="utf-8").split("\n") if x and _step_of(x) <= step]
                write_atomically(path, "".join(line + "\n" for line in lines))

    def _start_record(self, fingerprint: dict[str, str], command: list[str]) -> None:
        self.fingerprint = fingerprint
        starts = self.dir / "command.txt"
        line = shlex.join([*command[0].split(), *command[1:]])
        before = starts.read_text(encoding="utf-8").split("\n") if starts.exists() else []
        self.resumes = sum(1 for x in before if x)
        with open(starts, "a", encoding="utf-8") as f:
            f.write(line + "\n")
        for stale in self.dir.glob("*.partial"):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()
        write_atomically(self.dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(whole(self.cfg))))
        environment = environment_record() | {"determinism": determinism(self.seed)}
        environment |= {"processes": ranks.size(), "shard": bool(self.cfg.run.shard) and ranks.size() > 1}
        if earlier := self._earlier_processes(ranks.size()):
            environment["earlier_processes"] = earlier
        threads = self.state.get("threads")
        if threads is not None and threads != environment["threads"]:
            print(
                f"warning: begun with {threads} threads, goes on with {environment['threads']}: close, but not bit for bit. "
                f"Set run.threads={threads} for an exact resume.",
                file=sys.stderr,
            )
        self.write_json("environment.json", environment)

    def _earlier_processes(self, now: int) -> list[int]:
        """Other numbers of processes in which steps were done that this start goes on from: their seconds are in the ledger too."""
        try:
            before = json.loads((self.dir / "environment.json").read_text(encoding="utf-8")) if self.state else {}
        except (OSError, ValueError):
            return []
        counts = {*before.get("earlier_processes", []), before.get("processes", now)}
        return sorted(counts - {now})


def environment_record() -> dict[str, Any]:
    """Packages, commit, hardware and threads: what is needed to repeat a run."""
    packages = (
        "torch",
        "transformers",
        "tokenizers",
        "hydra-core",
        "omegaconf",
        "datasets",
        "peft",
        "sacrebleu",
        "wandb",
    )
    return {
        "alignkit": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git_commit": git_commit(Path(__file__).parent),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def determinism(seed: int) -> dict[str, Any]:
    """What is set that decides whether the same run gives the same numbers: the seed, and torch's switches."""
    return {
        "seed": seed,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "cudnn": {"deterministic": torch.backends.cudnn.deterministic, "benchmark": torch.backends.cudnn.benchmark},
        "mkldnn": torch.backends.mkldnn.is_available(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "environment": {
            name: os.environ.get(name)
            for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
        },
    }


def git_commit(start: Path) -> str | None:
    """The commit that is checked out around a folder, read from ``.git`` itself."""
    for folder in (start, *start.parents):
        head = folder / ".git" / "HEAD"
        if head.is_file():
            content = head.read_text().strip()
            if not content.startswith("ref: "):
                return content
            ref = folder / ".git" / content.removeprefix("ref: ")
            if ref.is_file():
                return ref.read_text().strip()
            packed = folder / ".git" / "packed-refs"
            lines = packed.read_text().split("\n") if packed.is_file() else []
            return next((x.split()[0] for x in lines if x.endswith(content.removeprefix("ref: "))), None)
    return None


def hash_weights(folder: Path) -> str:
    """SHA-256 over the safetensors files of a model folder, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def model_card(cfg: DictConfig, result: dict[str, Any]) -> str:
    """The README of ``final/``: where the weights come from and what they scored."""
    lines = [
        "---", "library_name: transformers", "tags: [alignkit, " + cfg.name + "]", "---",
        f"# {cfg.name}, seed {cfg.seed}", "",
        f"Trained by alignkit {__version__}, stage `{cfg.stage}`, from "
        + (f"`{cfg.model.path}`." if cfg.model.path else "scratch."),
        f"SHA-256 of the weights: `{result['weights_sha256']}`.", "",
    ]  # fmt: skip
    after = result["evaluation"]["after"] or {}
    for split, metrics in after.items():
        values = ", ".join(f"{k} {v['value']:.4g}" for k, v in metrics.items() if isinstance(v, dict))
        lines.append(f"- {split}: {values}")
    lines += [f"- {alarm['text']}" for alarm in result["audit"]]
    if cfg.stage == "rm":
        lines += [
            "", "`alignkit evaluate` and `reward=learned` read it with its template, tokens and scale: `reward_model.json`. Where",
            "`architectures` of `config.json` ends in ForSequenceClassification, transformers gives the same scores for the ids of",
            "the prompt (without an end token), of the response (without special tokens) and the end token, less `mean` and over `std`.",
        ]  # fmt: skip
    lines += ["", "```yaml", OmegaConf.to_yaml(OmegaConf.create(whole(cfg))), "```", ""]
    return "\n".join(lines)


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed process may be half written
        return sys.maxsize


def _sync(folder: Path) -> None:
    """Have the system put a folder's files on the disk before it is renamed into place."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def _under(ledger: dict[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): round(v, 3) for k, v in ledger.items() if k.startswith(prefix)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _keep_freed_memory() -> None:
    """Have glibc hold on to freed memory for the next step: giving it back and faulting it in anew, page by page, takes
    up to a tenth of a step on a processor. Other systems' allocators are left alone."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass  # not Linux: the peak is then the process's own since its start


def _peak_mb() -> float:
    """Peak memory since the last reset, in MB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
