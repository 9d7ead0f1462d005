"""Who draws the responses that an RL method learns from: the policy itself (``engine=transformers``), or an engine beside it.

An engine follows the policy: it takes over the weights, draws, and rests while the policy learns. It computes in another
way, so its log-probabilities are not the policy's. Responses of an engine are therefore scored by the policy, whose
log-probabilities are what losses see; the engine's own are kept beside them, and the distance is logged at every step.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from alignkit import ranks
from alignkit.batch import Batch
from alignkit.data import Row
from alignkit.decode import Decode
from alignkit.errors import UserError, need
from alignkit.loading import kind_of, resolve
from alignkit.scoring import by_parts

if TYPE_CHECKING:
    from alignkit.policy import Policy

SCORED = 4096  # tokens that the policy scores together
Response = tuple[list[int], list[float]]  # token ids, and the log-probability that each was drawn with


@dataclass(kw_only=True)
class Engine:
    """What draws instead of the policy: the settings that every engine has, and the calls that each defines."""

    truncate: float | None = (
        None  # cap of min(policy / engine, cap), which weighs each token's advantage; null: no weights
    )

    def __post_init__(self) -> None:
        need(self, "truncate > 0")
        self._follows = False  # whether its weights are the policy's, which learns nothing until ``rest``

    def ready(self) -> None:
        """Before anything is loaded.

        Raises:
            UserError: it cannot work here; says what to install or to start.
        """

    def follow(self, policy: Policy) -> None:
        """Take over the policy's weights at the first draw after ``rest``. Every rank calls it.

        A fused optimizer changes weights without a trace (``_version`` stays): the calls tell, and not the tensors.
        """
        if not self._follows:
            self.take(policy)
            self._follows = True

    def take(self, policy: Policy) -> None:
        """Take over the policy's weights; of one with adapters, whose other weights never change, the adapters alone."""
        raise NotImplementedError

    def draw(
        self,
        prompts: list[list[int]],
        counts: list[int],
        how: Decode,
        ends: list[int],
        taus: list[float],
        seeds: list[int],
    ) -> list[Response]:
        """``counts[i]`` responses to prompt i, adjacent. What is drawn depends on the weights and these arguments alone.

        Args:
            prompts: token ids.
            ends: tokens that end a response and belong to it.
            taus: temperature of each prompt.
            seeds: of each prompt, below 2**31.
        """
        raise NotImplementedError

    def rest(self) -> None:
        """The policy learns now: let go of the memory until the next ``follow``."""
        self._follows = False


def scratch(owner: object) -> str:
    """A folder of this machine that goes when its owner or the process does."""
    path = tempfile.mkdtemp(prefix="alignkit-engine-")
    weakref.finalize(owner, shutil.rmtree, path, True)
    return path


def build(cfg: DictConfig, algo: Any) -> Engine | None:
    """The engine that a configuration names; None: the policy itself. Nothing is loaded.

    Raises:
        UserError: it is not installed or not there, or cannot do what the method or the model asks for.
    """
    if not cfg.engine:
        return None
    from alignkit.launch import _build

    engine: Engine = _build(cfg.engine, "engine")
    for how in algo.decodings:
        asked = [name for name in ("entropy", "top") if getattr(how, name)] + (["stop"] if len(how.stop) > 1 else [])
        if asked:
            raise UserError(
                f"engine: {cfg.name} decodes with {asked[0]}, which vLLM has no equal of. Take engine=transformers."
            )
    if engine.truncate is not None and not algo.weighable:
        raise UserError(
            f"engine.truncate: {cfg.name} has no loss that weighs tokens by their advantages. Leave it null."
        )
    kind = _kind(cfg)
    if kind not in ("causal", None):
        what = "an encoder–decoder" if kind == "seq2seq" else "an encoder"
        raise UserError(
            f"engine: vLLM draws from causal models alone, and this one is {what}. Take engine=transformers, or another model "
            "(model=tiny_causal, say)."
        )
    engine.ready()
    return engine


def _kind(cfg: DictConfig) -> str | None:
    """``causal``, ``seq2seq`` or ``encoder``, by the model's configuration; None where it cannot be read, as loading will say."""
    from transformers import AutoConfig

    try:
        if cfg.model.path:
            return kind_of(AutoConfig.from_pretrained(resolve(cfg.model.path)))
        return kind_of(AutoConfig.for_model(**OmegaConf.to_container(cfg.model.config, resolve=True)))  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError):
        return None


def sample(
    policy: Policy, engine: Engine, rows: list[Row], counts: list[int], how: Decode,
    temperature: torch.Tensor | None, generator: torch.Generator | None,
) -> Batch:  # fmt: skip
    """What ``Policy.generate`` gives, drawn by an engine: ``logprobs`` are the policy's, ``extra["engine_logprobs"]`` (B, T)
    the engine's, at the temperature of ``logprobs``.

    Of several ranks each asks its own engine for its share.

    Raises:
        UserError: no room for so many tokens; what the engine raises.
    """
    engine.follow(policy)
    prompts = policy.encode_prompts(rows)
    policy.make_room(max(map(len, prompts)), how.max_new_tokens)
    taus = [1.0] * len(rows) if temperature is None else temperature.tolist()
    seeds = [0] * len(rows)
    if not how.greedy:
        seeds = torch.randint(
            2**31, (len(rows),), generator=generator
        ).tolist()  # of all rows, so that ranks go on alike
    own = ranks.share(len(rows))
    part = slice(own.start, own.stop)
    ends = [*policy.eos, *how.stop]
    found = ranks.each(
        lambda: engine.draw(prompts[part], counts[part], how, ends, taus[part], seeds[part]) if len(own) else []
    )
    drawn = [_cut(one, ends, how.max_new_tokens) for some in found for one in some]
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    prompt_ids, prompt_mask = policy._pad(prompts, "left")
    ids, mask = policy._pad([one for one, _ in drawn], "right")
    theirs = torch.zeros(mask.shape, device=policy.device)
    theirs[mask] = torch.tensor([x for _, some in drawn for x in some], device=policy.device)
    index = owner.to(policy.device)
    batch = Batch(
        prompt_ids=prompt_ids[index],
        prompt_mask=prompt_mask[index],
        response_ids=ids,
        mask=mask,
        group=index,
        rows=[rows[i] for i in owner.tolist()],
        responses=policy.decode_text(ids, mask),
        extra={"ended": policy.ended(ids, mask)},
    )
    drawn_at = torch.tensor(taus, device=policy.device)[index]
    compared = ours = _scored(policy, batch, drawn_at)
    if not how.tempered and any(tau != 1 for tau in taus):
        ours = _scored(policy, batch, torch.ones_like(drawn_at))
    if how.greedy:  # not drawn, so there is nothing to weigh
        theirs = compared
    return batch.with_(logprobs=ours, extra={**batch.extra, "engine_logprobs": theirs + (ours - compared)})


def _cut(response: Response, ends: list[int], most: int) -> Response:
    """Up to and with the first token that ends it, as ``decode`` leaves it."""
    ids, logprobs = response
    if not ids or len(ids) != len(logprobs):
        raise UserError(f"engine: gave a response of {len(ids)} tokens with {len(logprobs)} log-probabilities.")
    used = min(next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids)), most)
    return ids[:used], logprobs[:used]


def _scored(policy: Policy, batch: Batch, tau: torch.Tensor) -> torch.Tensor:
    """(B, T) the policy's own log-probabilities at these temperatures (B,)."""
    asked = batch.with_(extra={"tau": tau})
    with policy._evaluating(), torch.no_grad():
        return by_parts(asked, SCORED, lambda part: policy.forward(part, part.extra["tau"]))


def mismatch(batch: Batch) -> dict[str, float]:
    """How far the engine is from the policy, over the tokens of a step: mean and greatest |log policy - log engine|, and the
    mean of policy / engine, which is 1 in expectation where both cover the same tokens; empty where the policy has drawn."""
    if "engine_logprobs" not in batch.extra:
        return {}
    apart = _log_ratios(batch)[batch.mask]
    return {
        "engine/logprob_diff": float(apart.abs().mean()),
        "engine/logprob_diff_max": float(apart.abs().max()),
        "engine/ratio": float(apart.exp().mean()),
    }


def corrected(engine: Engine | None, batch: Batch) -> Batch:
    """The batch with each token's advantage times min(policy / engine, ``truncate``): truncated importance sampling.

    Yao, Liu et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (fengyao.notion.site/off-policy-rl,
    2025). There the weight stands before a token's gradient; here [ours] it is in the advantage, which is the same where a
    loss grows in proportion to it, as the policy gradient and its clipped forms do.
    """
    if engine is None or engine.truncate is None or "engine_logprobs" not in batch.extra:
        return batch
    assert batch.advantages is not None
    return batch.with_(advantages=batch.advantages * _log_ratios(batch).exp().clamp(max=engine.truncate))


def _log_ratios(batch: Batch) -> torch.Tensor:
    """(B, T) log policy - log engine of each token."""
    assert batch.logprobs is not None
    return batch.logprobs - batch.extra["engine_logprobs"][:, : batch.mask.shape[1]]  # rows may have left, and columns
