"""Reward models. Pipelines call ``score``, ``compare``, ``rank`` and ``token_scores`` and nothing else."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from alignkit import ops, policy
from alignkit.batch import Batch
from alignkit.comparator import SETTINGS, Comparator
from alignkit.config import Model
from alignkit.data import Row
from alignkit.decode import takes
from alignkit.errors import UserError
from alignkit.heads import Head, Scalar
from alignkit.loading import read, resolve
from alignkit.reader import Reader
from alignkit.scoring import by_rows

CHUNK = 512  # rows that are tokenized at a time


@dataclass(kw_only=True)
class Reading:
    """How a reward model reads a response and which of its states the head sees."""

    head: Head = field(default_factory=Scalar)
    template: str = "{prompt}"  # around a prompt that is text
    pooling: Literal["last", "eos", "mean", "all", "pattern"] = "last"
    pattern: list[int] = field(default_factory=list)
    max_tokens: int | None = None
    temperature: float = 1.0  # margins are differences of scores over it

    def to_json(self) -> dict[str, Any]:
        head = {"_target_": f"{type(self.head).__module__}.{type(self.head).__name__}", **asdict(self.head)}
        return {**{k: v for k, v in vars(self).items() if k != "head"}, "head": head}

    @staticmethod
    def from_json(settings: dict[str, Any], local: bool) -> Reading:
        """Raises UserError where the head's class is none, or another's than alignkit's and not on this machine (``local``)."""
        head = dict(settings["head"])
        module, _, name = str(head.pop("_target_")).rpartition(".")
        if module != "alignkit.heads" and not local:
            raise UserError(
                f"reward model: from the hub, only heads of alignkit itself are built, not {module}.{name}."
            )
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            cls = None
        if not (isinstance(cls, type) and issubclass(cls, Head)):
            raise UserError(f"reward model: its head {module}.{name} cannot be imported. Put its file on the path.")
        return Reading(**{**settings, "head": cls(**head)})


class Scorer(torch.nn.Module):
    """What is trained: a backbone and the head's weights."""

    def __init__(self, backbone: Any, head: torch.nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device


class RewardModel(Reader):
    """A backbone (causal, encoder or encoder–decoder), the states of a response, and a head on them."""

    def __init__(self, model: Scorer, tokenizer: Any, compute: torch.dtype, reading: Reading) -> None:
        super().__init__(model, tokenizer, compute)
        self.reading, self.head = reading, reading.head
        self.mean, self.std = 0.0, 1.0  # of the scores, taken off and divided by
        self.examples: list[Row] = []  # responses that set mean and std, and the self-test, when it is exported
        self.test: list[dict[str, Any]] = []  # of a loaded one: responses and the scores that they must have
        self.tested = str(compute)  # precision of these scores

    @property
    def scalar(self) -> bool:
        """Whether responses have scores of their own, of which margins are the differences."""
        return type(self.head).margins is Head.margins

    @property
    def limit(self) -> int:
        """Tokens of prompt and response together (of an encoder–decoder: of each) that are read."""
        return min(self.reading.max_tokens or self.max_positions, self.max_positions)

    # ---- what pipelines call -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, rows: list[Row], budget: int = 8192) -> Tensor:
        """(N,) float32 normalised score of each row's ``response`` to its ``prompt``.

        Raises:
            UserError: a score that is not finite; names the row.
        """
        return (self._raw(rows, budget) - self.mean) / self.std

    @torch.no_grad()
    def compare(self, rows: list[Row], budget: int = 8192) -> Tensor:
        """(N,) float64 probability that each row's ``chosen`` is better than its ``rejected``; 1/2 where they are the same."""
        z = self._over(both_sides(rows), budget, lambda part: self.outputs(part)[0]).double()
        return torch.sigmoid(self.margins(z))

    def margins(self, z: Tensor) -> Tensor:
        """Outputs (2N, k) of pairs, the chosen response first → (N,) log-odds that it is better."""
        return self.head.margins(z[0::2], z[1::2]) / self.reading.temperature

    @torch.no_grad()
    def ratings(self, rows: list[Row], budget: int = 8192) -> list[dict[str, float]]:
        """What a head with attributes gives each row's ``response``, by attribute.

        Raises:
            UserError: the head has none.
        """
        names = getattr(self.head, "names", None)
        if names is None:
            raise UserError(
                f"the reward model's head ({type(self.head).__name__}) gives no ratings. Train one with +algo=rm_regression."
            )
        z = self._over(rows, budget, lambda part: self.outputs(part)[0])
        return [dict(zip(names, one, strict=True)) for one in z.tolist()]

    def rank(self, row: Row, responses: list[str], budget: int = 8192) -> list[int]:
        """Indices of the responses to a row's prompt, the best first; equal ones in their order."""
        texts = list(dict.fromkeys(responses))  # the same text twice could differ by rounding
        scores = dict(
            zip(texts, self.score([{**row, "response": text} for text in texts], budget).tolist(), strict=True)
        )
        return torch.sort(
            torch.tensor([scores[text] for text in responses]), descending=True, stable=True
        ).indices.tolist()

    @torch.no_grad()
    def token_scores(self, batch: Batch, budget: int = 8192) -> Tensor:
        """(B, T) float32 a token, for responses in this model's own tokens; a row's sum is its score.

        With ``pooling=all`` what the head gives to each token; else by how much each token changes what the score would be
        if the response ended there. ``mean`` gives each token its share, ``pattern`` the last token all.

        Raises:
            UserError: the tokens are another tokenizer's.
        """
        ids = [one[:n].tolist() for one, n in zip(batch.response_ids, batch.lengths.tolist(), strict=True)]
        if (
            max(max(one) for one in ids) >= len(self.tokenizer)
            or self.decode_text(batch.response_ids, batch.mask) != batch.responses
        ):
            raise UserError(
                "token-level rewards need a reward model with the policy's own tokenizer; this one reads other tokens. "
                "Take reward.per=response, which goes by the text."
            )
        own = self._batch_of(ids, batch.rows, batch.responses)
        own = own.with_(extra={"row": torch.arange(len(own), device=own.mask.device)})
        found = torch.zeros(batch.mask.shape, device=own.mask.device)
        with self._evaluating():
            for part in own.split(budget):
                z, tokens = self.outputs(part, tokens=True)
                shares = self._shares(self.head.scores(z), self.head.scores(tokens.float()), part)
                found[part.extra["row"], : tokens.shape[1]] = shares * part.mask
        return found

    def _shares(self, scores: Tensor, tokens: Tensor, part: Batch) -> Tensor:
        """Scores (B,) of responses and (B, T) at every token → what each token adds to the normalised score."""
        last = ops.last_token(part.mask)
        if self.reading.pooling == "pattern":
            return last * ((scores - self.mean) / self.std)[:, None]
        if self.reading.pooling == "all":
            return (tokens - self.mean * last) / self.std
        if self.reading.pooling == "mean":
            return (tokens / part.lengths[:, None] - self.mean * last) / self.std
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=self.mean)
        return (tokens - before) / self.std

    # ---- the forward pass ----------------------------------------------------------------------------------------

    def outputs(self, batch: Batch, tokens: bool = False) -> tuple[Tensor, Tensor]:
        """((B, k) outputs of each response, (B, T, k) of each of its tokens; these empty unless asked for)."""
        return self._computed(lambda: self._outputs(batch, tokens))

    def _outputs(self, batch: Batch, tokens: bool) -> tuple[Tensor, Tensor]:
        states, whole, ids = self._states(batch)
        head, mask, pooling = self.model.head, batch.mask, self.reading.pooling
        each = head(states) if tokens or pooling == "all" else states[:, :0]
        if pooling == "all":
            return (each * mask[..., None]).sum(1).float(), each
        if pooling == "mean":
            picked = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        elif pooling == "pattern":
            picked = whole[torch.arange(len(ids), device=ids.device), self._after_pattern(ids, batch)]
        else:
            picked = states[torch.arange(len(states), device=states.device), batch.lengths - 1]
        return head(picked).float(), each

    def _states(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(states (B, T, H) of the response's tokens, having read them; states and ids of all that stands in one sequence)."""
        backbone, mask = self.model.backbone, batch.mask
        if self.kind == "seq2seq":
            first = batch.group_starts()
            owner = torch.unique_consecutive(batch.group, return_inverse=True)[1]
            prompt_mask = batch.prompt_mask.long()
            encoder = backbone.get_encoder()
            encoded = encoder(input_ids=batch.prompt_ids[first], attention_mask=prompt_mask[first]).last_hidden_state
            start = torch.tensor(self._start, device=mask.device).expand(len(batch), -1)
            out = backbone(
                encoder_outputs=(encoded[owner],),
                attention_mask=prompt_mask,
                decoder_input_ids=torch.cat([start, batch.response_ids], dim=1),
                use_cache=False,
            ).last_hidden_state[:, len(self._start) :]
            return out, out, batch.response_ids
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
        valid = torch.cat([batch.prompt_mask, mask], dim=1)
        order = (~valid).long().argsort(dim=1, stable=True)[:, : int(valid.sum(1).max())]  # padding goes to the right
        ids, valid = ids.gather(1, order), valid.gather(1, order)
        extra = {"use_cache": False} if takes(backbone, "use_cache") else {}
        whole = backbone(input_ids=ids, attention_mask=valid.long(), **extra).last_hidden_state
        place = batch.prompt_mask.sum(1, keepdim=True) + torch.arange(mask.shape[1], device=mask.device)
        place = place.clamp(max=ids.shape[1] - 1)
        return whole.gather(1, place[..., None].expand(-1, -1, whole.shape[-1])), whole, ids

    def _after_pattern(self, ids: Tensor, batch: Batch) -> Tensor:
        """(B,) where the last occurrence of the pattern ends in each row of ids (B, W)."""
        pattern = torch.tensor(self.reading.pattern, device=ids.device)
        wide = torch.nn.functional.pad(ids, (0, max(0, len(pattern) - ids.shape[1])), value=-1)
        hits = (wide.unfold(1, len(pattern), 1) == pattern).all(2)
        missing = (~hits.any(1)).nonzero().flatten().tolist()
        if missing:
            raise UserError(
                f"row {batch.rows[missing[0]]['id']}: the tokens {self.reading.pattern} of pooling=pattern are not in it."
            )
        place = torch.arange(hits.shape[1], device=ids.device) * hits
        return place.amax(1) + len(pattern) - 1

    @torch.no_grad()
    def embed(self, rows: list[Row], budget: int = 8192) -> Tensor:
        """(2N, H) what the backbone makes of both responses of N pairs: an encoder's first state, else the mean state."""

        def one(part: Batch) -> Tensor:
            states, whole, _ = self._states(part)
            return (
                whole[:, 0]
                if self.kind == "encoder"
                else (states * part.mask[..., None]).sum(1) / part.mask.sum(1, keepdim=True)
            )

        return self._over(both_sides(rows), budget, lambda part: self._computed(lambda: one(part)))

    # ---- texts ---------------------------------------------------------------------------------------------------

    def responses(self, rows: list[Row]) -> Batch:
        """Rows with a ``response``; neighbours with one prompt are a group."""
        return self._batch_of(
            self.encode_responses([row["response"] for row in rows]), rows, [row["response"] for row in rows]
        )

    def pairs(self, rows: list[Row]) -> Batch:  # type: ignore[override]
        """Rows with ``chosen`` and ``rejected``: two rows a group, the chosen one first."""
        batch = self.responses(both_sides(rows))
        group = torch.arange(len(rows), device=self.device).repeat_interleave(2)
        return batch.with_(group=group, rows=[row for row in rows for _ in range(2)])

    def too_long(self, rows: list[Row]) -> int:
        """How many of these rows' responses do not fit with their prompts, so that something is cut."""
        prompts = self.prompt_ids(rows)
        responses = self.encode_responses([row["response"] for row in rows])
        return sum(self._fit(p, r) != (p, r) for p, r in zip(prompts, responses, strict=True))

    def prompt_ids(self, rows: list[Row]) -> list[list[int]]:
        texts = [
            p if not isinstance(p := row["prompt"], str) else self.reading.template.replace("{prompt}", p)
            for row in rows
        ]
        return super().prompt_ids([{**row, "prompt": text} for row, text in zip(rows, texts, strict=True)])

    def _fit(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Both within the limit: the response is cut at its end (``eos`` keeps the end-of-sequence token), then the prompt at
        its beginning, of which a special token stays."""
        room = self.limit
        least = 2 if self.kind != "seq2seq" else 0  # tokens that the prompt keeps
        room_response = room - (len(self._start) if self.kind == "seq2seq" else least)
        if len(response) > room_response:
            response = response[:room_response]
            if self.reading.pooling == "eos":
                response = [*response[:-1], self.eos[0]]
        left = room if self.kind == "seq2seq" else room - len(response)
        if len(prompt) > left:
            first = prompt[:1] if prompt[0] in self.tokenizer.all_special_ids else []
            prompt = first + prompt[len(prompt) - left + len(first) :]
        return prompt, response

    def _batch_of(self, responses: list[list[int]], rows: list[Row], texts: list[str]) -> Batch:
        fitted = [self._fit(p, r) for p, r in zip(self.prompt_ids(rows), responses, strict=True)]
        prompt_ids, prompt_mask = self._pad([p for p, _ in fitted], "right" if self.kind == "seq2seq" else "left")
        ids, mask = self._pad([r for _, r in fitted], "right")
        new = [i == 0 or row["prompt"] != rows[i - 1]["prompt"] for i, row in enumerate(rows)]
        group = torch.tensor(new, device=self.device).long().cumsum(0)
        return Batch(prompt_ids, prompt_mask, ids, mask, group, rows, texts)

    def _raw(self, rows: list[Row], budget: int) -> Tensor:
        scores = self._over(rows, budget, lambda part: self.head.scores(self.outputs(part)[0]))
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"the reward model gives {float(scores[bad[0]])} to row {rows[bad[0]].get('id')}, response {rows[bad[0]]['response']!r}."
            )
        return scores

    def _over(self, rows: list[Row], budget: int, function: Callable[[Batch], Tensor]) -> Tensor:
        """``function`` of the rows' responses, in micro-batches of at most ``budget`` tokens, put back in order; on the processor."""
        found: list[Tensor] = []
        with self._evaluating():
            for first in range(0, len(rows), CHUNK):
                found.append(by_rows(self.responses(rows[first : first + CHUNK]), budget, function))
        return torch.cat(found)

    # ---- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the model: a plain ``AutoModelForSequenceClassification`` folder where that class computes the same scores,
        else the backbone and ``head.safetensors``; with adapters, these and the head."""
        path.mkdir(parents=True, exist_ok=True)
        backbone, head = self.model.backbone, self.model.head
        adapted = hasattr(backbone, "peft_config")
        plain = None if adapted else self._plain()
        if plain is not None:
            plain.save_pretrained(path)
        else:
            # the row of a new padding token is drawn from the seed again
            backbone.save_pretrained(path, **({"save_embedding_layers": False} if adapted else {}))
            save_file({k: v.contiguous() for k, v in head.state_dict().items()}, path / "head.safetensors")
        self.tokenizer.save_pretrained(path)
        settings = {
            "kind": "scorer",
            "reading": self.reading.to_json(),
            "mean": self.mean,
            "std": self.std,
            "test": self.test,
            "tested": self.tested,
        }
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _plain(self) -> Any:
        """The transformers classifier around the very same weights; None where it would not score as this model does."""
        config, head = self.model.config, self.model.head
        known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if (
            self.kind != "causal"
            or not known
            or self.reading.pooling not in ("last", "eos")
            or type(head) is not torch.nn.Linear
        ):
            return None
        config.num_labels = self.head.outputs
        config.pad_token_id = self.pad
        with torch.device("meta"):
            plain: Any = AutoModelForSequenceClassification.from_config(config)
        if not isinstance(getattr(plain, "score", None), torch.nn.Linear) or head.bias is not None:
            return None
        setattr(plain, plain.base_model_prefix, self.model.backbone)
        plain.score = head
        return plain

    def restore(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint of this very model in place."""
        if hasattr(self.model.backbone, "peft_config"):
            training = self.model.training
            self.model.backbone.load_adapter(checkpoint, adapter_name="default", is_trainable=True)
            self.model.train(training)
        else:
            self.model.backbone.load_state_dict(type(self.model.backbone).from_pretrained(checkpoint).state_dict())
        self.model.head.load_state_dict(_head_weights(checkpoint))

    def export(self, path: Path) -> None:
        """Write the whole model, adapters merged into it, with mean and deviation of its scores and a self-test."""
        if hasattr(self.model.backbone, "merge_and_unload"):
            self.model.backbone = self.model.backbone.merge_and_unload()
        if self.examples and self.scalar:
            self.mean, self.std = 0.0, 1.0
            raw = self.score(self.examples)
            deviation = float(raw.std()) if len(raw) > 1 else 0.0
            self.mean, self.std = float(raw.mean()), deviation if deviation > 1e-4 else 1.0  # equal but for rounding
            scores, self.tested = self.score(self.examples[:8]), str(self.compute)
            self.test = [
                {"prompt": row["prompt"], "response": row["response"], "score": float(s)}
                for row, s in zip(self.examples, scores, strict=False)
            ]
        self.save(path)

    def check(self) -> None:
        """Score the examples that were written with the model again.

        Raises:
            UserError: they score otherwise: another tokenizer, template, precision or package than it was made with.
        """
        if not self.test:
            return
        wanted = torch.tensor([one["score"] for one in self.test])
        found = self.score([{"id": i, **one} for i, one in enumerate(self.test)])
        apart = float((found - wanted).abs().max())
        if apart > (1e-2 if {self.tested, str(self.compute)} == {"torch.float32"} else 0.1):
            raise UserError(
                f"the reward model does not score as it did when it was saved: {apart:.3g} deviations apart on its own "
                f"examples. Look at its tokenizer, at dtype and at the version of transformers."
            )


def both_sides(rows: list[Row]) -> list[Row]:
    """Rows of pairs → twice as many rows with a ``response``: chosen, rejected, chosen, …"""
    return [{**row, "response": row[side]} for row in rows for side in ("chosen", "rejected")]


def build(cfg: Model, reading: Reading, seed: int, texts: list[str], checkpoint: Path | None = None) -> RewardModel:
    """The reward model that is to be trained: the backbone that ``cfg`` describes, a new head drawn from ``seed``.

    A path may be a policy, an encoder or a reward model; of the last one the head is taken over where it fits.
    """

    def prepare(backbone: Any, tokenizer: Any) -> None:
        torch.manual_seed(seed)
        _pad_apart(tokenizer, backbone)

    backbone, tokenizer, compute = read(
        cfg, seed, texts, checkpoint, lambda config: AutoModel, lambda config: None, prepare
    )
    torch.manual_seed(seed)
    head = reading.head.build(_width(backbone.config)).to(backbone.device, getattr(torch, cfg.dtype))
    folder = checkpoint or (_folder(cfg.path, only_cached=True) if cfg.path else None)
    weights = _head_weights(folder) if folder else {}
    if _shapes(weights) == _shapes(head.state_dict()):
        head.load_state_dict(weights)
    model = RewardModel(Scorer(backbone, head).eval(), tokenizer, compute, reading)
    if reading.pooling == "pattern" and not reading.pattern:
        raise UserError("algo.pooling=pattern: give algo.pattern, the token ids after which the state is taken.")
    return model


def load(path: str, device: str = "auto", compute: str = "same", dtype: str = "float32") -> RewardModel | Comparator:
    """A trained reward model: a run or folder of alignkit, or an ``AutoModelForSequenceClassification`` folder with one label
    and a linear head ``score``, as causal ones have it.

    Raises:
        UserError: no such model, one that is no reward model, a run that is not finished.
    """
    folder = _folder(path)
    if folder.name.startswith("checkpoint-") and folder != Path(path).expanduser():
        raise UserError(f"{path} is not finished. Repeat its command, or name {folder} to take it as it is.")
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return _load(path, folder, settings, Model(path=str(folder), device=device, compute=compute, dtype=dtype))
    except (KeyError, TypeError, ValueError, NotImplementedError) as e:
        if not file.is_file():
            raise
        raise UserError(f"{file} is damaged, or of another version ({type(e).__name__}: {e}).") from None


def _load(path: str, folder: Path, settings: dict[str, Any] | None, cfg: Model) -> RewardModel | Comparator:
    weights = _head_weights(folder)
    if settings is None and not weights:
        raise UserError(
            f"{path} is no reward model: {folder} has neither {SETTINGS} nor a head `score`. Train one with +algo=bt."
        )
    if settings and settings["kind"] == "comparator":
        return Comparator(policy.load(cfg, 0), *(settings[k] for k in ("template", "yes", "no")))
    model = build(
        cfg, Reading.from_json(settings["reading"], Path(path).expanduser().exists()) if settings else Reading(), 0, []
    )
    wanted = _shapes(model.model.head.state_dict())
    if _shapes(weights) != wanted:
        raise UserError(
            f"{path}: the weights of its head, {_shapes(weights) or 'none'}, must be {wanted}, "
            + (f"as {SETTINGS} says." if settings else "those of a classifier with one label.")
        )
    if settings:
        model.mean, model.std, model.test = settings["mean"], settings["std"], settings["test"]
        model.tested = settings.get("tested", "torch.float32")
    model.model.requires_grad_(False)
    return model


def _folder(path: str, only_cached: bool = False) -> Path:
    """The folder of a model: its own, or that in the hub's cache, into which it is loaded unless ``only_cached``."""
    folder = Path(resolve(path))
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                path,
                local_files_only=only_cached,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            )
        )
    except (OSError, ValueError) as e:
        if only_cached:  # it lies elsewhere, and was loaded from there
            return folder
        raise UserError(
            f"model.path={path}: cannot be loaded ({type(e).__name__}: {str(e).splitlines()[0]}). Check the id or folder; "
            f"with HF_HUB_OFFLINE=1 only what lies in the cache is found."
        ) from None


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in weights.items()}


def _head_weights(folder: Path) -> dict[str, Tensor]:
    """The head's weights in a folder, by their names in the head; empty where there are none."""
    if (folder / "head.safetensors").is_file():
        return load_file(folder / "head.safetensors")
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {k.removeprefix("score."): tensors.get_tensor(k) for k in tensors.keys() if k.startswith("score.")}  # noqa: SIM118
    return found


def _width(config: Any) -> int:
    return int(getattr(config, "hidden_size", None) or config.d_model)


def _pad_apart(tokenizer: Any, backbone: Any) -> None:
    """A pad token that is not the end-of-sequence token, in which the last token that counts could not be told."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        if len(tokenizer) > backbone.get_input_embeddings().weight.shape[0]:
            backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        backbone.config.pad_token_id = tokenizer.pad_token_id
