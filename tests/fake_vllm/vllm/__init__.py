"""A stand-in for vLLM: the names, arguments and states that alignkit uses, with a transformers model inside.

It holds weights of its own, so weights that are not handed over are not there; it refuses what vLLM refuses, and does what
vLLM does where that can go wrong: it seeds the generators of the whole process, keeps what it has computed of a prompt, and
forgets its weights in a sleep of level 2.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

log: list[str] = []  # what has been done to every engine, in order


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")
        if not 0 < self.top_p <= 1 or self.top_k < -1 or self.temperature < 0 or self.max_tokens < 1:
            raise ValueError("a sampling parameter is out of its range")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class _Model:
    """The model of a worker, of which only the weights can be set, by the names of a checkpoint."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def load_weights(self, weights: Any) -> set[str]:
        if self.llm.asleep["weights"]:
            raise RuntimeError("weights are written to memory that is not mapped")
        own = dict(self.llm.model.named_parameters())
        loaded = set()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)  # KeyError: a name that no checkpoint has
                loaded.add(name)
        log.append(f"load {len(loaded)}")
        return loaded


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        load_format: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        enable_sleep_mode: bool = False,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        logprobs_mode: str = "raw_logprobs",
        distributed_executor_backend: str | None = None,
    ) -> None:
        assert skip_tokenizer_init or (Path(model) / "tokenizer.json").exists()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # as a worker in this process does
        config = AutoConfig.from_pretrained(model)
        assert config.architectures, "no model class"
        self.model = AutoModelForCausalLM.from_config(config).to(
            torch.float32 if dtype == "auto" else getattr(torch, dtype)
        )
        if load_format != "dummy":
            self.model = AutoModelForCausalLM.from_pretrained(model)
        self.model.eval()
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.logprobs_mode, self.sleeps, self.loras = (
            logprobs_mode,
            enable_sleep_mode,
            max_lora_rank if enable_lora else 0,
        )
        self.asleep = {"weights": False, "kv_cache": False}
        self.cache: dict[Any, torch.Tensor] = {}  # prompt → what follows it, as long as nobody asks to forget it
        self.adapters: dict[int, Any] = {}
        self.settings = {
            "memory": gpu_memory_utilization,
            "eager": enforce_eager,
            "backend": distributed_executor_backend,
        }
        log.append(f"build memory={gpu_memory_utilization}")

    def apply_model(self, func: Any) -> list[Any]:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise TypeError("a function cannot be sent to the engine's process")
        return [func(_Model(self))]

    def sleep(self, level: int = 1) -> None:
        if not self.sleeps or any(self.asleep.values()):
            raise RuntimeError("sleep mode is not enabled, or it sleeps already")
        if level == 2:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.normal_(generator=torch.Generator().manual_seed(0))  # whatever the memory holds next
        self.asleep = {"weights": True, "kv_cache": True}
        self.cache.clear()
        log.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        for tag in tags or list(self.asleep):
            self.asleep[tag] = False
        log.append(f"wake {tags}")

    def reset_prefix_cache(self) -> bool:
        self.cache.clear()
        return True

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        if any(self.asleep.values()):
            raise RuntimeError("the engine is asleep")
        model = self._with(lora_request)
        found = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            ids = list(prompt["prompt_token_ids"])
            if len(ids) >= self.max_model_len:
                raise ValueError("the prompt is longer than the maximum model length")
            one = RequestOutput(ids)
            for index in range(how.n):
                one.outputs.append(self._one(model, ids, how, index, lora_request))
            found.append(one)
        return found

    def _with(self, request: Any) -> Any:
        """The model with an adapter; the base's own weights are not touched by it."""
        if request is None:
            return self.model
        assert self.loras and request.lora_int_id > 0
        if request.lora_int_id not in self.adapters:
            copied = AutoModelForCausalLM.from_config(self.model.config)
            copied.load_state_dict(self.model.state_dict())
            self.adapters[request.lora_int_id] = PeftModel.from_pretrained(copied, request.lora_path).eval()
            assert max(c.r for c in self.adapters[request.lora_int_id].peft_config.values()) <= self.loras
        return self.adapters[request.lora_int_id]

    @torch.no_grad()
    def _one(self, model: Any, prompt: list[int], how: SamplingParams, index: int, lora: Any) -> CompletionOutput:
        generator = torch.Generator().manual_seed((how.seed or 0) + index)
        ids, logprobs, reason = list(prompt), [], "length"
        for t in range(min(how.max_tokens, self.max_model_len - len(prompt))):
            key = (tuple(prompt), lora and lora.lora_name)
            logits = (
                self.cache[key] if t == 0 and key in self.cache else model(torch.tensor([ids])).logits[0, -1].float()
            )
            if t == 0:
                self.cache[key] = logits
            raw = logits.log_softmax(-1)
            processed = (logits / how.temperature if how.temperature else logits).log_softmax(-1)
            if how.top_k > 0:
                processed[processed < processed.topk(how.top_k).values[-1]] = -torch.inf
            if how.top_p < 1:
                ordered, places = processed.softmax(-1).sort(descending=True)
                processed[places[ordered.cumsum(-1) - ordered >= how.top_p]] = -torch.inf
            processed = processed.log_softmax(-1)
            token = (
                int(torch.multinomial(processed.exp(), 1, generator=generator))
                if how.temperature
                else int(raw.argmax())
            )
            told = processed if self.logprobs_mode == "processed_logprobs" else raw
            ids.append(token)
            logprobs.append({token: Logprob(float(told[token]), 1)})
            if token in (how.stop_token_ids or ()) or (not how.ignore_eos and token == self.model.config.eos_token_id):
                reason = "stop"
                break
        return CompletionOutput(index, ids[len(prompt) :], None if how.logprobs is None else logprobs, reason)
