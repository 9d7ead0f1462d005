"""The model being aligned: it generates, and it scores responses token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from alignkit import ops
from alignkit.batch import Batch
from alignkit.config import Lora, Model
from alignkit.critic import ValueModel
from alignkit.data import Row
from alignkit.decode import Decode, decode
from alignkit.errors import UserError, suggest
from alignkit.scoring import Piece, by_parts, scatter, teacher_forced

transformers_logging.disable_progress_bar()  # the run has a bar of its own

BUNDLED = Path(__file__).parent / "assets" / "models"
T = TypeVar("T")


class Policy:
    """A causal or encoder–decoder language model behind one interface."""

    def __init__(self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32) -> None:
        self.model = model
        self.compute = compute  # precision of sampling and of the forward and backward pass
        self.critic: ValueModel | None = None
        self.tokenizer = tokenizer
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.eos = _eos_ids(model, tokenizer)
        self.pad = tokenizer.pad_token_id
        self._start: list[int] = []
        if self.is_encoder_decoder:
            self._start = [model.config.decoder_start_token_id]
            forced = getattr(model.generation_config, "forced_bos_token_id", None)
            if forced is not None:
                self._start.append(forced)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        """Tokens that the positions allow; large when the architecture sets no limit."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or getattr(
            self.model.config, "n_positions", None
        )
        relative = self.model.config.model_type in ("t5", "mt5", "umt5", "longt5")
        return 10**9 if relative or not limit else int(limit)

    def encode_prompts(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of each row's prompt; chat messages go through the tokenizer's own template.

        Raises:
            UserError: a prompt longer than the model's positions, or a chat without a chat template.
        """
        texts = [row["prompt"] for row in rows]
        plain = [t for t in texts if isinstance(t, str)]
        encoded = iter(self.tokenizer(plain)["input_ids"] if plain else [])
        ids = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, str):
                one = next(encoded)
                if not self.is_encoder_decoder:
                    if one and one[-1] in self.eos:
                        one = one[:-1]  # some tokenizers close every text; a causal prompt must stay open
                    if not one:  # a causal model needs a token to start from
                        one = [self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eos[0]]
            else:
                if not self.tokenizer.chat_template:
                    raise UserError(
                        "the data are chat messages, but the tokenizer has no chat template. Use an instruct model, "
                        "or render the prompt as text with data.prompt."
                    )
                one = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            if len(one) > self.max_positions:
                raise UserError(
                    f"the prompt of row {row['id']} has {len(one)} tokens; the model takes {self.max_positions}: "
                    f"{str(text)[:60]!r}… Shorten or drop such rows."
                )
            ids.append(one)
        return ids

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, closed with the end-of-sequence token."""
        if self.is_encoder_decoder:
            encoded = self.tokenizer(text_target=texts, split_special_tokens=True)["input_ids"]
            # what the decoder is given as its prefix is not part of the response
            skip = len(self._start) - 1
            encoded = [ids[skip:] if skip and ids[:skip] == self._start[1:] else ids for ids in encoded]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [ids if ids and ids[-1] in self.eos else [*ids, self.eos[0]] for ids in encoded]

    def demonstrations(self, rows: list[Row], max_tokens: int | None = None) -> Batch:
        """Rows with their ``response`` as the response, one group each; longer responses are cut.

        Raises:
            UserError: a row without a response.
        """
        for row in rows:
            if row["response"] is None:
                raise UserError(
                    f"training row {row['id']} has no response. Set data.response to a template over the columns."
                )
        return self._batch(rows, [ids[:max_tokens] for ids in self.encode_responses([r["response"] for r in rows])])

    def pairs(self, rows: list[Row], max_tokens: int | None = None) -> Batch:
        """Rows with a ``chosen`` and a ``rejected`` response: two rows a group, the chosen one first; longer ones are cut."""
        both = [{**row, "response": row[side]} for row in rows for side in ("chosen", "rejected")]
        batch = self.demonstrations(both, max_tokens)
        return batch.with_(group=batch.group // 2, rows=[row for row in rows for _ in range(2)])

    def judged(self, rows: list[Row], max_tokens: int | None = None) -> Batch:
        """Rows with one response that is desirable or not: ``extra["desirable"]`` (B,) bool; longer ones are cut."""
        batch = self.demonstrations(rows, max_tokens)
        desirable = torch.tensor([row["desirable"] for row in rows], device=self.device)
        return batch.with_(extra={**batch.extra, "desirable": desirable})

    def answered(self, batch: Batch, texts: list[str], max_tokens: int | None = None) -> Batch:
        """The prompts of a batch with other responses, a text for each row; longer ones are cut."""
        ids, mask = self._pad([one[:max_tokens] for one in self.encode_responses(texts)], "right")
        return Batch(batch.prompt_ids, batch.prompt_mask, ids, mask, batch.group, batch.rows, texts)

    def generate(
        self,
        rows: list[Row],
        n: int | list[int],
        how: Decode,
        *,
        temperature: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Draw ``n`` responses to each row (or ``n[i]`` to row i); they form one group, adjacent.

        The batch carries the ``logprobs`` of the drawn tokens, and ``extra["entropy"]`` and ``extra["top"]`` where asked for.
        """
        counts = torch.tensor([n] * len(rows) if isinstance(n, int) else n)
        prompt_ids, prompt_mask = self._pad(self.encode_prompts(rows), "right" if self.is_encoder_decoder else "left")
        room = self.max_positions - (0 if self.is_encoder_decoder else prompt_ids.shape[1])
        if how.max_new_tokens > room:
            raise UserError(
                f"max_new_tokens={how.max_new_tokens} is more than the model's {self.max_positions} positions allow "
                f"(room here: {room}). Lower it, or shorten the prompts."
            )
        with self._evaluating(), torch.no_grad():
            out = self._computed(
                lambda: decode(
                    self.model, prompt_ids, prompt_mask, counts.to(self.device), how,
                    eos=self.eos, pad=self.pad, start=self._start, temperature=temperature, generator=generator,
                )
            )  # fmt: skip
        owner = torch.arange(len(rows)).repeat_interleave(counts)
        index = owner.to(self.device)
        return Batch(
            prompt_ids=prompt_ids[index],
            prompt_mask=prompt_mask[index],
            response_ids=out.ids,
            mask=out.mask,
            group=index,
            rows=[rows[i] for i in owner.tolist()],
            responses=self.decode_text(out.ids, out.mask),
            logprobs=out.logprobs,
            extra={"ended": self._ended(out.ids, out.mask)}
            | {name: x for name, x in (("entropy", out.entropy), ("top", out.top)) if x is not None},
        )

    def _ended(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) bool: whether each row's last token that counts is an end-of-sequence token."""
        return (torch.isin(ids, torch.tensor(self.eos, device=ids.device)) & mask).any(1)

    def decode_text(self, ids: Tensor, mask: Tensor) -> list[str]:
        """(B, T) ids → B texts without special tokens."""
        kept = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def forward(self, batch: Batch, temperature: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T) float32 of the batch's response tokens, 0 where the mask is false.

        ``temperature`` (B,) divides the logits of each row first.
        """
        return self.score(batch, temperature)[0]

    def score(self, batch: Batch, temperature: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(log-probabilities (B, T), outputs (B, T, m) of a critic that shares the trunk, from the same pass)."""
        shared = self.critic is not None and self.critic.trunk is None
        forced = partial(teacher_forced, self.model, batch, self._start, hidden=shared)
        pieces = self._computed(lambda: list(forced()))
        logprobs = []
        for piece in pieces:
            assert piece.logits is not None
            tau = None if temperature is None else temperature[piece.where // batch.mask.shape[1]]
            logprobs.append(ops.token_logprobs(piece.logits, batch.response_ids.flatten()[piece.where], tau))
        where = torch.cat([piece.where for piece in pieces])
        raw = self._head_values(pieces, batch.mask) if shared else None
        return scatter(torch.cat(logprobs), where, batch.mask), raw

    def value_outputs(self, batch: Batch) -> Tensor:
        """What the critic puts out before each token: (B, T, m), m = 1 or the bins of a histogram; 0 off the mask."""
        assert self.critic is not None
        trunk = self.model if self.critic.trunk is None else self.critic.trunk
        forced = partial(teacher_forced, trunk, batch, self._start, logits=False, hidden=True)
        return self._head_values(self._computed(lambda: list(forced()), trunk), batch.mask)

    def _head_values(self, pieces: list[Piece], mask: Tensor) -> Tensor:
        assert self.critic is not None
        hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
        return scatter(
            self.critic.head(hidden.to(self.critic.head.weight.dtype)),
            torch.cat([piece.where for piece in pieces]),
            mask,
        )

    def _computed(self, work: Callable[[], T], model: Any = None) -> T:
        """``work()`` with the model's weights in ``compute`` precision; gradients reach the float32 weights.

        The cast stands in the graph, so that gradients of micro-batches add up in float32.
        """
        model = self.model if model is None else model
        if self.compute == next(model.parameters()).dtype:
            return work()
        cast = {f"model.{name}": p.to(self.compute) for name, p in model.named_parameters()}
        cast |= {
            f"model.{name}": b.to(self.compute)
            for name, b in model.named_buffers()
            if b.is_floating_point() and not name.endswith("inv_freq")  # rotary angles need float32
        }
        result: T = torch.func.functional_call(_Swapped(model), cast, (work,))
        return result

    def beam(self, rows: list[Row], beams: int, max_new_tokens: int) -> Batch:
        """The best of a beam search for each row, by transformers' own search."""
        prompt_ids, prompt_mask = self._pad(self.encode_prompts(rows), "right" if self.is_encoder_decoder else "left")
        with self._evaluating():
            out = self.model.generate(
                input_ids=prompt_ids, attention_mask=prompt_mask.long(), num_beams=beams, do_sample=False,
                max_new_tokens=max_new_tokens + max(0, len(self._start) - 1),
                pad_token_id=self.pad, eos_token_id=self.eos,
            )  # fmt: skip
        ids = out[:, len(self._start) if self.is_encoder_decoder else prompt_ids.shape[1] :]
        ended = torch.isin(ids, torch.tensor(self.eos, device=ids.device)).long()
        mask = ended.cumsum(1) - ended == 0  # up to and with the first end-of-sequence token
        group = torch.arange(len(rows), device=self.device)
        return Batch(prompt_ids, prompt_mask, ids, mask, group, rows, self.decode_text(ids, mask))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode, of a critic's own trunk too."""
        self.model.train(mode)
        if self.critic is not None:
            self.critic.train(mode)

    def drop_dropout(self) -> None:
        """Make training mode equal to evaluation mode: RL samples and scores one and the same distribution."""
        for module in self.model.modules():
            for name, value in vars(module).items():
                if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def restore(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint of this very policy in place."""
        source = type(self.model).from_pretrained(checkpoint) if not hasattr(self.model, "peft_config") else None
        if source is not None:
            self.model.load_state_dict(source.state_dict())
        else:
            training = self.model.training
            self.model.load_adapter(checkpoint, adapter_name="default", is_trainable=True)
            self.model.train(training)

    def save(self, path: Path) -> None:
        """Write a plain ``save_pretrained`` folder; of adapters alone, where only these are trained."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def export(self, path: Path) -> None:
        """Write the whole model as a plain ``save_pretrained`` folder, adapters merged into it."""
        if hasattr(self.model, "merge_and_unload"):
            self.model = self.model.merge_and_unload()
        self.save(path)

    def lint(self) -> list[str]:
        """What is wrong with the special tokens, as sentences: an empty list when nothing is."""
        found = []
        if self.pad in self.eos:
            found.append(
                "pad_token is eos_token: the end of a response cannot be told from padding by its id. alignkit masks by "
                "position, but other tools may train a model that never stops; give the tokenizer a pad token of its own."
            )
        return found

    def _batch(self, rows: list[Row], responses: list[list[int]]) -> Batch:
        prompt_ids, prompt_mask = self._pad(self.encode_prompts(rows), "right" if self.is_encoder_decoder else "left")
        ids, mask = self._pad(responses, "right")
        return Batch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=ids,
            mask=mask,
            group=torch.arange(len(rows), device=self.device),
            rows=rows,
            responses=[row["response"] for row in rows],
            extra={"ended": self._ended(ids, mask)},
        )

    def _pad(self, sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        width = max(len(s) for s in sequences)
        ids, mask = [], []
        for s in sequences:
            fill = [self.pad] * (width - len(s))
            ids.append(fill + s if side == "left" else s + fill)
            ones, zeros = [True] * len(s), [False] * len(fill)
            mask.append(zeros + ones if side == "left" else ones + zeros)
        return torch.tensor(ids, dtype=torch.long, device=self.device), torch.tensor(mask, device=self.device)


class _Swapped(torch.nn.Module):
    """Lets ``functional_call`` put other weights into a model while some work is done with it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def reference(policy: Policy, cfg: Model, seed: int, texts: list[str], budget: int) -> Callable[[Batch], Tensor]:
    """What gives the start model's log-probabilities (B, T) of a batch, without a graph.

    With adapters the start model is the policy's own with the adapter off; else it is loaded a second time.
    """
    if cfg.lora.r:

        def start(part: Batch) -> Tensor:
            with policy.model.disable_adapter():
                return policy.forward(part, part.extra.get("logprob_temperature"))
    else:
        frozen = load(cfg, seed, texts)
        frozen.model.requires_grad_(False)

        def start(part: Batch) -> Tensor:
            return frozen.forward(part, part.extra.get("logprob_temperature"))

    return torch.no_grad()(lambda batch: by_parts(batch, budget, start))


def load(cfg: Model, seed: int, texts: list[str] = (), checkpoint: Path | None = None) -> Policy:  # type: ignore[assignment]
    """The policy that ``cfg`` describes, with the weights of ``checkpoint`` where a run goes on.

    Args:
        texts: what a tokenizer is trained on, where the model is built from scratch.

    Raises:
        UserError: no such model, a folder without weights, a model of the other kind, no end-of-sequence token.
    """
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"model.device={device}: torch {torch.__version__} cannot use it ({str(e).splitlines()[0]})."
        ) from None
    dtype = getattr(torch, cfg.dtype)
    if checkpoint and not cfg.lora.r:
        model, tokenizer = _pretrained(str(checkpoint), cfg, dtype)
    elif cfg.path:
        model, tokenizer = _pretrained(resolve(cfg.path), cfg, dtype)
    elif cfg.config:
        model, tokenizer = _from_scratch(cfg, texts, seed)
        model = model.to(dtype)
    else:
        raise UserError("model: give model.path (an id, a folder, a run) or model.config (built from scratch).")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a response could never end. Set eos_token in it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if cfg.compute == "bfloat16" and device == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32")
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora.r:
        model = _with_lora(model, cfg.lora, checkpoint, seed)
    compute = torch.bfloat16 if cfg.compute == "bfloat16" else dtype
    policy = Policy(model.to(device).eval(), tokenizer, compute)
    for found in policy.lint():
        print(f"warning: {found}", file=sys.stderr)
    return policy


def resolve(path: str) -> str:
    """``bundled:NAME`` and run directories → the folder that holds the weights; the rest is returned as is.

    Raises:
        UserError: unknown bundled name, a folder without a model in it.
    """
    if path.startswith("bundled:"):
        folder = BUNDLED / path.removeprefix("bundled:")
        if not folder.is_dir():
            raise UserError(
                f"model.path={path}: not bundled.{suggest(folder.name, [p.name for p in BUNDLED.glob('*')])}"
            )
        return str(folder)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"model.path={path}: no such folder.")
        if folder.parent.is_dir() and "/" in path:
            near = [str(p) for p in folder.parent.iterdir() if p.is_dir()]
            raise UserError(f"model.path={path}: no such run or folder.{suggest(path, near)}")
        return path  # a hub id
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif not (folder / "config.json").exists():
        saved = sorted(
            (p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()),
            key=lambda p: int(p.name.rpartition("-")[2]),
        )
        if not saved:
            raise UserError(f"model.path={path}: neither a model (config.json) nor a run with final/ or checkpoint-N/.")
        folder = saved[-1]
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model.path={path}: {folder.name} is a LoRA adapter alone. Finish the run: its final/ is a whole model."
        )
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith(".safetensors.index.json")]
    if not weights:
        raise UserError(f"model.path={path}: {folder} has no weights (*.safetensors). Other formats are not loaded.")
    return str(folder)


def _pretrained(path: str, cfg: Model, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(path)
        kind = "seq2seq" if config.is_encoder_decoder else "causal"
        if cfg.kind not in ("auto", kind):
            raise UserError(f"model.path={path} is a {kind} model, but model.kind={cfg.kind} was asked for.")
        auto = AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
        tokenizer = _tokenizer(cfg.tokenizer or path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(
            f"model.path={path}: cannot be loaded ({type(e).__name__}: {reason}). Check the id or folder; with "
            f"HF_HUB_OFFLINE=1 only what lies in the cache is found."
        ) from None
    if info["missing_keys"]:
        raise UserError(f"model.path={path}: the weights lack {', '.join(sorted(info['missing_keys'])[:3])}.")
    return model, tokenizer


def _tokenizer(path: str) -> Any:
    file = Path(path) / "tokenizer_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _from_scratch(cfg: Model, texts: list[str], seed: int) -> tuple[Any, Any]:
    settings = dict(cfg.config)
    try:
        tokenizer = _tokenizer(cfg.tokenizer) if cfg.tokenizer else train_tokenizer(texts, cfg.vocab_size)
    except (OSError, ValueError) as e:
        raise UserError(f"model.tokenizer={cfg.tokenizer}: cannot be loaded ({str(e).splitlines()[0]}).") from None
    if "model_type" not in settings:
        raise UserError("model.config: give model_type (for example m2m_100, t5, llama); the rest are its settings.")
    try:
        config = AutoConfig.for_model(
            settings.pop("model_type"),
            **{
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "decoder_start_token_id": tokenizer.bos_token_id,
                **settings,
            },
        )
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        torch.manual_seed(seed)
        return auto.from_config(config), tokenizer
    except (ValueError, TypeError, StrictDataclassError) as e:
        raise UserError(f"model.config: {' '.join(str(e).split())[:300]}") from None


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, none is unknown, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _with_lora(model: Any, lora: Lora, checkpoint: Path | None, seed: int) -> Any:
    """The model with adapters: of the checkpoint, or new ones drawn from ``seed``.

    Raises:
        UserError: ``target_modules`` names none of the model's layers.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    targets = lora.target_modules
    if targets is None and model.config.model_type not in KNOWN:
        targets = "all-linear"
    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
                task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
            ),
        )
    except ValueError as e:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UserError(
            f"model.lora: {str(e).split(chr(10))[0]} Set model.lora.target_modules; linear layers are: "
            f"{', '.join(sorted(linear))}."
        ) from None


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-sequence id first, then what the generation config adds."""
    extra = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])]
    return list(dict.fromkeys(i for i in ids if i is not None))
