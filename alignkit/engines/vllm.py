"""vLLM in the process that trains.

Read, not run (there was no GPU at hand): vLLM's ``LLM``, ``SamplingParams``, ``Worker.sleep`` and ``wake_up``,
``ParentRequest`` and the sleep mode's documentation, and TRL's ``generation/vllm_generation.py``, which makes most of these
calls and supports vLLM 0.22 to 0.31. Not verified: several ranks (``external_launcher``, as TRL has it), ``load_format=dummy``
and ``apply_model`` of every architecture, adapters after a sleep of level 1.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from alignkit import ranks
from alignkit.decode import Decode
from alignkit.engines import Engine, Response, scratch
from alignkit.errors import UserError, need

if TYPE_CHECKING:
    from alignkit.policy import Policy

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


@dataclass(kw_only=True)
class VLLM(Engine):
    """vLLM in this process, on the policy's GPU: weights are loaded in place after each update; while the policy learns it sleeps.

    It is built at the first draw, of the policy's configuration and without weights of its own, so a model of any source will
    do. With adapters the base is loaded once, and then only adapters, from a folder. Of several ranks each has one, for its
    share.
    """

    memory: float = 0.3  # share of the GPU's memory that it may take while it draws, weights included
    length: int | None = None  # tokens of a prompt and its response at most; null: the model's positions
    sleep: Literal[0, 1, 2] = (
        2  # while the policy learns: 0 stays awake, 1 keeps its weights in the machine's memory, 2 keeps nothing
    )
    eager: bool = False  # without CUDA graphs: slower, less memory, a quicker start

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "memory > 0", "memory <= 1", "length >= 2")
        self._llm: Any = None
        self._asleep = False
        self._lora: Any = None  # the request for the present adapter
        self._version = 0
        self._folder = ""  # of the model's configuration, and of adapters

    def ready(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "engine=vllm needs vLLM, which is not installed: pip install -e '.[vllm]' in alignkit's folder."
            )

    def follow(self, policy: Policy) -> None:
        ranks.each(lambda: self._follow(policy))

    def _follow(self, policy: Policy) -> None:
        asleep, self._asleep = self._asleep, False
        if asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what training has freed is needed now
            self._llm.wake_up(tags=["weights"])  # of level 2: there is room for them, but nothing in it
        super().follow(policy)
        if asleep:
            self._llm.wake_up(tags=["kv_cache"])

    def take(self, policy: Policy) -> None:
        if self._llm is None:
            self._build(policy)
        elif not _adapters(policy):
            self._load(policy)
        if _adapters(policy):
            from vllm.lora.request import LoRARequest

            self._version += 1  # a new name and number: nothing that vLLM keeps by them can be an old one's
            path = Path(self._folder) / f"adapter-{self._version}"
            policy.model.save_pretrained(path)
            self._lora = LoRARequest(f"adapter-{self._version}", self._version, str(path))
        self._llm.reset_prefix_cache()

    def _build(self, policy: Policy) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights need not be sent
        from vllm import LLM

        self._folder = scratch(self)
        base = policy.model.get_base_model() if _adapters(policy) else policy.model
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(self._folder)
        more: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if _several() else {}
        if _adapters(policy):
            rank = max(c.r for c in policy.model.peft_config.values())
            more |= {"enable_lora": True, "max_lora_rank": next((r for r in RANKS if r >= rank), rank)}
        numbers = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():  # it seeds every generator, and a resumed run builds it in another step
            self._llm = LLM(
                model=self._folder, skip_tokenizer_init=True, load_format="dummy", seed=0,
                dtype=str(policy.compute).removeprefix("torch."), gpu_memory_utilization=self.memory,
                max_model_len=self.length, enforce_eager=self.eager, enable_sleep_mode=bool(self.sleep),
                logprobs_mode="processed_logprobs", **more,
            )  # fmt: skip
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        self._load(policy)

    def _load(self, policy: Policy) -> None:
        """The weights that are not an adapter's, by the names of a checkpoint, in place."""
        weights = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach()
            for name, p in policy.model.named_parameters()
            if ".lora_" not in name
        }
        self._llm.apply_model(lambda model: model.load_weights(iter(weights.items())) and None)

    def draw(
        self,
        prompts: list[list[int]],
        counts: list[int],
        how: Decode,
        ends: list[int],
        taus: list[float],
        seeds: list[int],
    ) -> list[Response]:
        from vllm import SamplingParams

        longest = max(map(len, prompts)) + how.max_new_tokens
        if self.length is not None and longest > self.length:
            raise UserError(
                f"engine.length={self.length} is less than a prompt and its response take ({longest}). Raise it."
            )
        asked = [
            SamplingParams(
                n=1 if how.greedy else n, temperature=0.0 if how.greedy else tau, top_p=how.top_p, top_k=how.top_k,
                seed=seed, max_tokens=how.max_new_tokens, stop_token_ids=ends, ignore_eos=True, logprobs=0, detokenize=False,
            )
            for n, tau, seed in zip(counts, taus, seeds, strict=True)
        ]  # fmt: skip
        found = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False, lora_request=self._lora
        )
        drawn = []
        for n, one in zip(counts, found, strict=True):
            some: list[Response] = [
                (list(o.token_ids), [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)])
                for o in sorted(one.outputs, key=lambda o: o.index)
            ]
            drawn += some * n if how.greedy else some
        return drawn

    def rest(self) -> None:
        super().rest()
        if self._llm is not None and self.sleep and not self._asleep:
            self._llm.sleep(
                level=1 if self._lora is not None else self.sleep
            )  # with adapters the base is not loaded again
            self._asleep = True


def _adapters(policy: Policy) -> bool:
    return hasattr(policy.model, "peft_config")


def _several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
