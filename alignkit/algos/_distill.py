"""What every distillation method brings to the loop: a teacher, four kinds of knowledge, and how much of each is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_model
from torch import Tensor

from alignkit import classifier, losses, ops, policy
from alignkit.algos._fit import Fit
from alignkit.batch import Batch, Loss
from alignkit.config import Model
from alignkit.data import Row
from alignkit.errors import UserError, need
from alignkit.loading import resolve
from alignkit.reader import Reader
from alignkit.run import Run
from alignkit.scoring import Seen, scatter
from alignkit.teacher import Teacher

KNOWLEDGE = ("finetune", "response", "feature", "relation")  # FinK, ResK, FeaK, RelK of arXiv 2302.00444


@dataclass(kw_only=True)
class Distill(Fit):
    """Settings of the student's training: losses of four kinds of knowledge, each a mean, added up with weights.

    Of a model that writes, tokens are the response's, and a row's summary, where [CLS] stands for a classifier's, is their
    mean state (ours).
    """

    batch_size: int = 64
    lr: float = 5e-4
    warmup: int = 20
    task: Literal["classify", "write"] = "classify"  # write: a language model, causal or encoder–decoder
    teacher: str | None = None  # run, folder, hub id or bundled:NAME; null where only the labels teach
    temperature: float = 2.0  # of both sides of the response knowledge, whose loss is multiplied by its square
    layer_map: Literal["skip", "last", "first"] = (
        "skip"  # student layer j looks at teacher layer j L_T / L_S (rounded down), L_T - L_S + j, or j
    )
    features: Literal["tokens", "summary"] = (
        "tokens"  # feature knowledge: states of every token, or of each row's [CLS] made of length 1 (PKD)
    )
    loss_scale: Literal["none", "init_mean"] = (
        "none"  # init_mean: each loss is divided by its mean over the first `scale_steps` steps
    )
    scale_steps: int = 50
    cache_gb: float = (
        0.0  # keep what the teacher says of the training rows in memory, up to so much; 0: ask at every step
    )
    max_tokens: int | None = None  # of a classifier's text, or of a response: longer ones are cut
    fixed: ClassVar[tuple[float, float, float, float] | None] = None  # weights that never change
    uses: ClassVar[tuple[bool, bool, bool, bool]] = (True, True, True, True)  # knowledge that may have a weight

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "temperature > 0", "scale_steps >= 1", "cache_gb >= 0", "max_tokens >= 2")
        self._labels: list[str] = []
        self._teacher: Teacher | None = None
        self._sums, self._steps = [0.0] * 4, 0  # of the losses of the first steps

    @property
    def taught(self) -> tuple[bool, bool, bool, bool]:
        """Which of the four kinds of knowledge may have a weight."""
        return tuple(w > 0 for w in self.fixed) if self.fixed else self.uses  # type: ignore[return-value]

    def prepare(self, rows: list[Row], sides: tuple[str, ...]) -> list[Row]:
        if any(self.taught[1:]) and self.teacher is None:
            raise UserError(
                "algo.teacher: must be given: the run or model that is distilled, as in algo.teacher=runs/finetune-s0-…"
            )
        if self.task == "classify":
            self._labels = classifier.labels_of(rows)
        return rows

    def losses(self) -> dict[str, Any]:
        """The settings that say what a weight of 1 means."""
        return {k: getattr(self, k) for k in ("temperature", "features", "layer_map", "loss_scale", "scale_steps")}

    def spent(self) -> dict[str, float]:
        """What was spent to find out how to distil, before this run: student trainings, their steps, seconds."""
        return {"student_runs": 0, "steps": 0, "seconds": 0.0}

    @property
    def teacher_model(self) -> Any:
        """The frozen classifier or policy that teaches, None where there is none."""
        return None if self._teacher is None else self._teacher.reader

    # ---- models --------------------------------------------------------------------------------------------------

    def build(self, cfg: Model, seed: int, texts: list[str], checkpoint: Path | None) -> Any:
        """The student; with it the teacher is loaded, and maps where their widths differ."""
        teacher = self._read_teacher(cfg)
        if self.teacher is not None and cfg.config and not cfg.tokenizer:
            # also where the labels alone teach: students that are compared differ in nothing but their losses
            cfg = replace(cfg, tokenizer=self._of_teacher(lambda: resolve(str(self.teacher))))
        student: Any
        if self.task == "classify":
            same = teacher is not None and sorted(teacher.labels) == self._labels
            labels = teacher.labels if same else self._labels  # in the teacher's order
            student = classifier.load(cfg, seed, texts, labels, checkpoint, self.max_tokens)
        else:
            student = policy.load(cfg, seed, texts, checkpoint)
        if teacher is not None:
            self._match(student, teacher, seed)
            if student.beside is not None and checkpoint:
                load_model(student.beside, checkpoint / "state" / "beside.safetensors")
        return student

    def _read_teacher(self, cfg: Model) -> Any:
        if self.teacher is None or not any(self.taught[1:]):
            return None
        how = Model(path=self.teacher, device=cfg.device, compute=cfg.compute)
        if self.task == "classify":
            return self._of_teacher(lambda: classifier.load(how, 0, max_tokens=self.max_tokens))
        return self._of_teacher(lambda: policy.load(how, 0))

    def _of_teacher(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except UserError as e:
            raise UserError(str(e).replace("model.path=", "algo.teacher=", 1)) from None

    def _match(self, student: Reader, teacher: Reader, seed: int) -> None:
        """Refuse a teacher that this student cannot learn from; give the student maps to the teacher's width."""
        if self.task == "classify" and student.labels != teacher.labels:  # type: ignore[attr-defined]
            ours, theirs = set(student.labels), set(teacher.labels)  # type: ignore[attr-defined]
            sides = [
                f"only {whose} has {', '.join(repr(x) for x in sorted(only)[:5])}{' …' if len(only) > 5 else ''}"
                for whose, only in (("the teacher", theirs - ours), ("data.train", ours - theirs))
                if only
            ]
            raise UserError(
                f"algo.teacher={self.teacher}: its labels are not those of the training rows: "
                f"{'; '.join(sides) or 'the order is another one'}. Train a teacher on the same labels, or look at data.response."
            )
        if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise UserError(
                f"algo.teacher={self.teacher}: it reads other tokens than the student. Set model.tokenizer to the teacher's, "
                f"or begin the student as some of its layers: model.path={self.teacher} model.layers=N."
            )
        if student.kind != teacher.kind:
            raise UserError(f"algo.teacher={self.teacher}: its kind is {teacher.kind}, the student's {student.kind}.")
        if student.depth > teacher.depth:
            raise UserError(
                f"algo.teacher={self.teacher}: has {teacher.depth} layers, fewer than the student's {student.depth}."
            )
        if isinstance(student, classifier.Classifier) and isinstance(teacher, classifier.Classifier):
            student.limit = teacher.limit = min(student.limit, teacher.limit)  # both read the same tokens
        self._layers = self._looked_at(student.depth)
        few, many = student.depth, teacher.depth
        looks_at = {
            "skip": lambda j: j * many // few,
            "last": lambda j: many - few + j if j else 0,
            "first": lambda j: j,
        }[self.layer_map]
        self._map = {j: looks_at(j) for j in self._layers}  # embeddings at embeddings
        wanted = dict.fromkeys([*self._map.values(), many] if self._map else [])
        self._teacher = Teacher(teacher, list(wanted))
        if self._layers and student.width != teacher.width:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                maps = [torch.nn.Linear(student.width, teacher.width, bias=False) for _ in self._layers]
            student.beside = torch.nn.ModuleList(maps).to(student.device, next(student.model.parameters()).dtype)

    def _looked_at(self, depth: int) -> list[int]:
        """Student layers whose states are compared: all; of one alone, where there are relations, the embeddings too."""
        if not any(self.taught[2:]):
            return []
        first = 0 if self.taught[3] and depth == 1 else 1
        return list(range(first, depth + 1))

    def collate(self, student: Any) -> Any:
        """Rows → batch, for the loop."""
        return lambda rows: student.demonstrations(rows, self.max_tokens)

    def survey(self, student: Any, rows: list[Row], run: Run, texts: list[str]) -> None:
        self._run = run
        if self._teacher is not None and self.cache_gb:
            with run.phase("teacher"):
                self._teacher.ask(rows, self.collate(student), self.micro_tokens, self.cache_gb)

    # ---- a step --------------------------------------------------------------------------------------------------

    def whole(self, student: Any, batch: Batch, generator: torch.Generator) -> Batch:
        """With ``extra["weights"]`` (B, 4), what each kind of knowledge counts in this step, and ``extra["scale"]`` (B, 4), what
        its loss is divided by."""
        weights = self.weigh(student, batch, generator)
        scale = torch.ones(4)
        if self.loss_scale == "init_mean":
            if self._steps < self.scale_steps:
                self._sums = [a + b for a, b in zip(self._sums, self._means(student, batch), strict=True)]
                self._steps += 1
            scale = torch.tensor([s / self._steps if s > 0 else 1.0 for s in self._sums])
        extra = {"weights": weights, "scale": scale}
        more = {k: v.to(batch.mask.device).expand(len(batch), -1) for k, v in extra.items()}
        return batch.with_(extra={**batch.extra, **more})

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """(4,) how much each kind of knowledge counts in this step."""
        if self.fixed is None:
            raise NotImplementedError(f"{type(self).__name__} must define weigh(student, batch, generator)")
        return torch.tensor(self.fixed)

    def by_position(self, weights: Tensor, student: Seen, batch: Batch) -> Tensor:
        """Weights (B, 4) → (B, T, 4), or (B, 1, 4), those of each position: here the same everywhere."""
        return weights[:, None]

    def loss(self, student: Any, batch: Batch) -> Loss:
        four, seen = self.knowledge(student, batch)
        weights = self.by_position(batch.extra["weights"], seen, batch)
        total = ((four * (weights / batch.extra["scale"][:, None])).sum(-1) * batch.mask).sum()
        count = float(batch.mask.sum())
        with torch.no_grad():
            means = (four * batch.mask[..., None]).sum((0, 1)) / max(count, 1.0)
            used = (weights.expand_as(four) * batch.mask[..., None]).sum((0, 1)) / max(count, 1.0)
        metrics = {f"loss/{k}": float(x) for k, x, on in zip(KNOWLEDGE, means, self.taught, strict=True) if on}
        metrics |= {f"weight/{k}": float(x) for k, x in zip(KNOWLEDGE, used, strict=True)}
        return Loss(total, count, metrics)

    def knowledge(self, student: Any, batch: Batch) -> tuple[Tensor, Seen]:
        """((B, T, 4) losses at each position of the response, unscaled, 0 where a kind is not used; what the student saw).

        What is one number a row stands at each of its positions.
        """
        on = self.taught
        seen = student.seen(batch, self._layers if self._teacher is not None else ())
        logprobs = ops.token_logprobs(seen.logits, batch.response_ids[batch.mask])
        where = batch.mask.flatten().nonzero().squeeze(1)
        four = [scatter(-logprobs, where, batch.mask)] + [torch.zeros_like(logprobs[:1]).expand(batch.mask.shape)] * 3
        if self._teacher is None:
            return torch.stack(four, -1), seen
        told = self._teacher.seen(batch)
        if on[1]:
            four[1] = scatter(losses.response(seen.logits, told.logits, self.temperature), where, batch.mask)
        if on[2] or on[3]:
            mapped = self._mapped(student, seen)
            theirs = Seen(told.logits, {j: told.states[of] for j, of in self._map.items()}, told.where, told.first)
            if on[2]:
                four[2] = self._feature(mapped, theirs, batch)
            if on[3]:
                ours, told_ = ([s.states[layer] for layer in self._layers] for s in (mapped, theirs))
                four[3] = losses.relation(ours, told_, mapped.where)[:, None].expand(batch.mask.shape)
        return torch.stack(four, -1), seen

    def _mapped(self, student: Any, seen: Seen) -> Seen:
        """The student's states in the teacher's width."""
        if student.beside is None:
            return seen
        maps = zip(self._layers, student.beside, strict=True)
        states = {layer: m(seen.states[layer].to(m.weight.dtype)) for layer, m in maps}
        return Seen(seen.logits, states, seen.where, seen.first)

    def _feature(self, student: Seen, teacher: Seen, batch: Batch) -> Tensor:
        """(B, T) mean over the layers that are compared (never the embeddings)."""
        layers = [layer for layer in self._layers if layer]
        if self.features == "summary":
            rows = [losses.patient(student.summary(layer), teacher.summary(layer)) for layer in layers]
            return torch.stack(rows).mean(0)[:, None].expand(batch.mask.shape)
        tokens = torch.stack([losses.feature(student.states[k], teacher.states[k]) for k in layers]).mean(0)
        if student.where is batch.mask:
            return tokens
        rows_ = (tokens * student.where).sum(1) / student.where.sum(1)  # a classifier's position is the whole row
        return rows_[:, None].expand(batch.mask.shape)

    @torch.no_grad()
    def states(self, student: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """((d_S,), (d_T,)) mean over the batch of both models' last summaries, on the processor; without dropout."""
        assert self._teacher is not None
        sums: list[Tensor] = []
        with student._evaluating():
            for part in batch.split(self.micro_tokens):
                ours = student.seen(part, [student.depth]).summary(student.depth)
                theirs = self._teacher.seen(part).summary(self._teacher.reader.depth)
                found = [x.float().sum(0).cpu() for x in (ours, theirs)]
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        return sums[0] / len(batch), sums[1] / len(batch)

    @torch.no_grad()
    def _means(self, student: Any, batch: Batch) -> list[float]:
        """Mean of each loss over the batch, without dropout."""
        total, count = torch.zeros(4), 0.0
        with student._evaluating():
            for part in batch.split(self.micro_tokens):
                four = self.knowledge(student, part)[0] * part.mask[..., None]
                total, count = total + four.sum((0, 1)).cpu(), count + float(part.mask.sum())
        return (total / count).tolist()

    def state(self) -> dict[str, object]:
        return {"sums": self._sums, "steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sums, self._steps = [float(x) for x in state["sums"]], int(state["steps"])
