"""Before the first step: what would go wrong in an hour is looked for in the first seconds."""

from __future__ import annotations

import copy
import errno
import random
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from omegaconf import DictConfig, OmegaConf

from alignkit.batch import Batch
from alignkit.config import whole
from alignkit.data import Row
from alignkit.errors import UserError
from alignkit.policy import Policy
from alignkit.rewards import Reward, judged, of_texts
from alignkit.rewards.mix import Mix
from alignkit.rewards.rule import Constant
from alignkit.verify import saved

if TYPE_CHECKING:
    from alignkit.run import Run

LOOKED_AT = 64  # rows whose tokens are looked at
ASKED = 8  # rows of which the reward is asked, three responses each, in one call: a reward may be dear
SMALLER = {  # phase → settings that make it need less memory: the first three that a run has are named
    "update": (
        "algo.micro_tokens", "model.gradient_checkpointing", "algo.max_new_tokens", "algo.max_response_tokens", "algo.max_tokens",
        "model.compute",
    ),
    "sample": ("algo.prompts_per_step", "algo.max_new_tokens", "algo.k_max", "algo.k", "algo.batch_size", "model.compute"),
    "score": ("reward.micro_tokens", "algo.micro_tokens", "algo.prompts_per_step", "algo.max_new_tokens"),
    "evaluate": ("evaluate.batch_size", "evaluate.max_new_tokens", "evaluate.samples", "algo.micro_tokens"),
    "refine": ("algo.rows_per_part", "algo.max_new_tokens", "model.compute"),
}  # fmt: skip


def rl(run: Run, policy: Policy, algo: Any, rows: list[Row], reward: Reward, optimizer: torch.optim.Optimizer) -> None:
    """Of a policy that learns from its samples: tokens and template, the reward, the disk, the longest micro-batch.

    Raises:
        UserError: checkpoints that cannot fit on the disk, or more tokens a response than the model has positions.
    """
    if not run.cfg.run.preflight or run.first_step >= algo.steps:
        return
    met = _met(run, rows, algo.rows_per_step, algo.steps)
    policy.make_room(1, algo.max_new_tokens)
    _tell(run, lint(policy, met[:LOOKED_AT]))
    if not run.checkpoint:
        _tell(run, ask(reward, met, policy))
    disk(run, policy, optimizer, algo.steps)
    policy.train(run.cfg.model.gradient_checkpointing)
    try:
        _try(
            run, policy, optimizer, lambda: _longest_samples(policy, algo, met), lambda part: _score(policy, algo, part)
        )
    except UserError as e:  # responses may never become so long
        if run.shards:  # the other processes wait for this one's pass
            raise
        _tell(run, [f"if every response goes to its limit, this will happen: {e}"])
    policy.train(False)


def fit(
    run: Run, model: Any, algo: Any, rows: list[Row], collate: Callable[[list[Row]], Batch],
    optimizer: torch.optim.Optimizer, steps: int,
) -> None:  # fmt: skip
    """Of a model that learns from rows: tokens and template, whether responses end, the disk, the longest micro-batch.

    Args:
        steps: optimizer steps from the start on.

    Raises:
        UserError: what would end the run later.
    """
    if not run.cfg.run.preflight or run.first_step >= steps:
        return
    met = _met(run, rows, algo.batch_size, steps)
    if isinstance(model, Policy):
        _tell(run, lint(model, met[:LOOKED_AT]))
    disk(run, model, optimizer, steps)
    probe = _apart(algo)

    def longest() -> Batch:
        if isinstance(model, Policy) and not getattr(algo, "end", None):
            _tell(run, unended(collate(met[: min(algo.batch_size, LOOKED_AT)]), run.cfg))
        batch = collate(sorted(met, key=_length, reverse=True)[: algo.batch_size])
        with torch.no_grad():
            parts = probe.whole(model, batch, run.generator(0, "preflight")).split(algo.micro_tokens)
        return max(parts, key=_cells)

    model.model.train()
    _try(run, model, optimizer, longest, lambda part: probe.loss(model, part).total)
    model.model.eval()


def refine(run: Run, policy: Policy | None, algo: Any, rows: list[Row], reward: Reward | None) -> None:
    """Of a method that makes a data set: tokens and template, and the reward that it goes by.

    Raises:
        UserError: what would end the run later.
    """
    if not run.cfg.run.preflight:
        return
    if policy is not None:
        _tell(run, lint(policy, rows[:LOOKED_AT]))
    if algo.needs_reward and reward is not None and not run.first_step:
        _tell(run, ask(reward, rows, policy))


def _tell(run: Run, found: list[str]) -> None:
    for text in found:
        run.progress.say(text if text.startswith("note: ") else f"warning: {text}")


def _met(run: Run, rows: list[Row], size: int, steps: int) -> list[Row]:
    """The rows that the run will draw, all of them where it goes through them once."""
    return run.draw(rows, min(len(rows), size * steps), 0)


def _length(row: Row) -> int:
    """Characters of a row's texts: what is longest in them is nearly what is longest in tokens, and costs nothing."""
    texts = [row["prompt"], row.get("response"), row.get("chosen"), row.get("rejected")]
    return sum(len(text) if isinstance(text, str) else len(str(text)) for text in texts if text)


# ---- tokens and template ---------------------------------------------------------------------------------------------


def lint(policy: Policy, rows: list[Row]) -> list[str]:
    """What is odd about how prompts and responses become tokens, as sentences; empty when nothing is.

    Raises:
        UserError: the chat template refuses a row.
    """
    found = []
    tokenizer, bos = policy.tokenizer, policy.tokenizer.bos_token_id
    chats = [row for row in rows if not isinstance(row["prompt"], str)]
    for row in chats[:1] + [row for row in chats if _system(row)][:1]:
        found += [text for text in _template(policy, row) if text not in found]
    twice = sum(ids[:2] == [bos, bos] for ids in policy.prompt_ids(rows)) if bos is not None else 0
    if twice:
        found.append(
            f"{twice} of {len(rows)} prompts begin with two {tokenizer.bos_token!r}: the text has one, and the tokenizer adds "
            "another. Take it out of data.prompt or of the chat template."
        )
    end = tokenizer.eos_token
    spelled = (
        sum(isinstance(row.get("response"), str) and row["response"].rstrip().endswith(end) for row in rows)
        if end
        else 0
    )
    if spelled:
        found.append(
            f"{spelled} of {len(rows)} responses end with {end!r} as text, which is learned letter by letter before the real end "
            "token. Take it out of the data or of data.response."
        )
    return found


def _system(row: Row) -> str:
    return next((str(turn["content"]) for turn in row["prompt"] if turn["role"] == "system"), "")


def _template(policy: Policy, row: Row) -> list[str]:
    """What is odd about how the tokenizer's template renders a chat."""
    tokenizer, chat, answer = policy.tokenizer, list(row["prompt"]), "\u2042answer\u2042"
    if not tokenizer.chat_template:
        return []  # refused with a message of its own
    try:
        opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        closed = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    except TemplateError as e:
        raise UserError(f"row {row['id']}: the tokenizer's chat template refuses it: {e} Change data.prompt.") from None
    found = []
    if _system(row) and _system(row).strip() not in opened:
        found.append(
            "the chat template leaves out the system message: the model never sees it. Put it into the user's turn."
        )
    try:
        told = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], tokenize=False)
    except TemplateError:
        return found  # a template for prompts alone
    header, _, tail = told.removeprefix(closed).partition(answer)
    if opened == closed and told.startswith(closed) and header.strip():
        found.append(
            f"the chat template renders no generation prompt ({header.strip()!r}): prompts end before the model's turn begins. "
            "Take a template that knows add_generation_prompt."
        )
    ends = [tokenizer.convert_ids_to_tokens(i) for i in policy.eos]
    if answer in told and tail.strip() and not any(end in tail for end in ends):
        found.append(
            f"the chat template ends a turn with {tail.strip()!r}, but responses end with {ends[0]!r}: who asks this model through "
            "its template waits for another end. Set eos_token of the tokenizer to the template's."
        )
    return found


def unended(batch: Batch, cfg: DictConfig) -> list[str]:
    """Whether not one response of a batch still has its end-of-sequence token, as a sentence."""
    ended = batch.extra.get("ended")
    if ended is None or bool(ended.any()):
        return []
    limit = next(
        (f"algo.{name}={cfg.algo[name]}" for name in ("max_response_tokens", "max_tokens") if cfg.algo.get(name)), ""
    )
    return [
        f"none of the {len(batch)} responses looked at ends with the end-of-sequence token{f' ({limit} cuts them all)' if limit else ''}: "
        "the model does not learn to stop."
    ]


# ---- the reward ------------------------------------------------------------------------------------------------------


def ask(reward: Reward, rows: list[Row], policy: Policy | None = None) -> list[str]:
    """What is odd about a reward that scores references, references of other rows and empty responses, as sentences.

    Of ``ASKED`` rows, in one call of a copy; random numbers are put back. Rows without a reference are asked of empty responses alone.
    """
    known = [(row, text) for row in rows[: 8 * ASKED] if (text := _reference(row)) is not None][:ASKED]
    asked = [(row, text) for row, text in known]
    others = [
        next((other for _, other in known[i:] + known[:i] if other != text), None) for i, (_, text) in enumerate(known)
    ]
    asked += [(row, other) for (row, _), other in zip(known, others, strict=True) if other is not None]
    asked += [(row, "") for row in rows[:ASKED]]
    given = [{**row, "response": text} for row, text in asked]
    batch = of_texts(given) if policy is None else policy.demonstrations(given)
    try:
        with _random_numbers_kept():
            scored = judged(_copied(reward), batch.with_(rows=[row for row, _ in asked]))
    except Exception as e:  # these responses are made up, and a reward may hold what cannot be copied
        return [
            f"the reward was not tried on references and empty responses: {(str(e).splitlines() or [type(e).__name__])[0]}"
        ]
    assert scored.scores is not None
    scores = scored.scores.double().cpu()
    if isinstance(reward, Constant):
        return ["note: reward=constant says the same of every response: a control."]
    if len(known) > 1 and bool((scores == scores[0]).all()):
        return [
            f"the reward gives {float(scores[0]):.4g} to all of {len(scores)} responses: references, references of other rows and "
            "empty ones. Nothing can be learned from it; look at reward.* and at the columns that it reads."
        ]
    paired = [i for i, other in enumerate(others) if other is not None]
    if len(paired) < 2:
        return []
    own, foreign = scores[paired], scores[len(known) : len(known) + len(paired)]
    gap = own - foreign
    if float(gap.mean()) < -2 * float(gap.std()) / len(paired) ** 0.5:
        return [
            f"the reward gives references {float(own.mean()):.4g} in the mean and references of other rows {float(foreign.mean()):.4g}, "
            "more: is its sign right?"
        ]
    return []


def _copied(reward: Reward) -> Reward:
    """One to ask without a trace: alignkit's own rewards keep no state, those of others may."""
    if isinstance(reward, Mix):
        mixed = copy.copy(reward)
        mixed.rewards = {name: _copied(part) for name, part in reward.rewards.items()}
        return mixed
    return reward if type(reward).__module__.startswith("alignkit.") else copy.deepcopy(reward)


def _reference(row: Row) -> str | None:
    text = row["references"][0] if row.get("references") else row.get("response")
    return text if isinstance(text, str) and text else None


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """What draws from torch's, numpy's or Python's own generator leaves them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# ---- the disk --------------------------------------------------------------------------------------------------------


def disk(run: Run, model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Refuse a run whose checkpoints cannot fit on the disk, counting those that are sure to lie there at the same time.

    Raises:
        UserError: says what is needed and what is free.
    """
    whole_of = run.shards.whole_of if run.shards else lambda p: p  # checkpoints are those of one process
    trained = sum(whole_of(p).numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    lora = hasattr(model.model, "peft_config")
    weights = trained if lora else sum(p.numel() * p.element_size() for p in model.model.parameters())
    beside = sum(
        p.numel() * p.element_size() for m in (model.critic, model.beside) if m is not None for p in m.parameters()
    )
    one = weights + (0 if lora else beside) + 2 * trained
    left = steps - run.first_step
    saves = left // run.cfg.run.save_every + bool(left % run.cfg.run.save_every)
    kept = min(max(1, run.cfg.run.keep) + 1, saves)  # one more while it takes the place of the oldest
    there = len(list(run.home.glob("checkpoint-*[0-9]")))
    needed, free = one * max(0, kept - there), shutil.disk_usage(run.home).free
    if needed > free:
        raise UserError(
            f"{run.home}: {kept} checkpoints of {_size(one)} lie there at the same time (run.keep={run.cfg.run.keep} and the one that "
            f"is written), but {_size(free)} are free. Lower run.keep, choose another run.root, or free some space."
        )


def _size(n: float) -> str:
    return next(
        f"{n / 10**e:.3g} {unit}" for e, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (0, "bytes")) if n >= 10**e or not e
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def _try(
    run: Run,
    model: Any,
    optimizer: torch.optim.Optimizer,
    longest: Callable[[], Batch],
    loss: Callable[[Batch], torch.Tensor],
) -> None:
    """The longest micro-batch forward and backward, beside what AdamW will keep; nothing of it stays.

    Raises:
        UserError: it does not fit into the memory.
    """
    ledger, shape = dict(run.ledger), ""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with _random_numbers_kept():
            # empty: reserved on a GPU, and not even touched on a processor
            room = (
                [torch.empty_like(p) for p in weights for _ in range(2)]
                if not (optimizer.state or run.cfg.run.offload)
                else []
            )
            part = longest()
            shape = shape_of(part)
            loss(part).backward()
            del room
    except (MemoryError, RuntimeError, OSError) as e:
        if not out_of_memory(e):
            raise
        raise UserError(
            too_large(run, "update", f"the longest batch, before the first step{shape and ': '}{shape}", e)
        ) from None
    finally:
        if run.shards:
            run.shards.take_gradients()
        for p in weights:
            p.grad = None
        run.ledger.clear()
        run.ledger.update(ledger)


def _longest_samples(policy: Policy, algo: Any, rows: list[Row]) -> Batch:
    """The largest micro-batch of the longest prompts, if every response goes to its limit."""
    k = max(getattr(algo, "k_max", 1), getattr(algo, "k", 1))
    longest = sorted(rows, key=_length, reverse=True)[: -(-algo.prompts_per_step // algo.minibatches)]
    encoded = policy.encode_prompts(longest[:LOOKED_AT])
    width = max(map(len, encoded))
    tokens = algo.max_new_tokens
    if not policy.is_encoder_decoder:
        tokens = max(1, min(tokens, policy.max_positions - width))
    cost, groups = [len(ids) + k * tokens for ids in encoded], 1
    while groups < len(encoded) and sum(cost[: groups + 1]) <= algo.micro_tokens:
        groups += 1
    ids, mask = policy._pad(encoded[:groups], "right" if policy.is_encoder_decoder else "left")
    group = torch.arange(groups, device=ids.device).repeat_interleave(k)
    response = ids.new_full((groups * k, tokens), policy.eos[0])
    texts = [""] * len(group)
    return Batch(
        ids[group], mask[group], response, torch.ones_like(response, dtype=torch.bool), group,
        [longest[i] for i in group.tolist()], texts,
    )  # fmt: skip


def _score(policy: Policy, algo: Any, batch: Batch) -> torch.Tensor:
    """A sum that goes back through all that an RL loss goes back through."""
    logprobs, raw = policy.score(batch)
    total = logprobs.sum()
    if algo.critic is not None:
        total = total + (policy.value_outputs(batch) if raw is None else raw).sum()
    rows = [batch.rows[i] for i in batch.group_starts().tolist()]
    if algo.wants_mle and all(row["response"] for row in rows):
        total = total + policy.forward(policy.demonstrations(rows, algo.max_new_tokens)).sum()
    return total


def _apart(algo: Any) -> Any:
    """The method again, so that what it notes down of a batch is not noted in the one that trains; models are shared."""
    probe = copy.copy(algo)
    for name, value in vars(algo).items():
        if isinstance(value, list | dict | set | deque | Counter):
            setattr(probe, name, copy.copy(value))
    return probe


def _cells(part: Batch) -> int:
    return len(part) * (part.prompt_ids.shape[1] + part.response_ids.shape[1])


def shape_of(part: Batch) -> str:
    """Rows and tokens of a batch, in words."""
    return f"{len(part)} rows × {part.prompt_ids.shape[1]} + {part.response_ids.shape[1]} tokens"


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of a GPU or of the machine."""
    if isinstance(e, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(e, OSError):
        return e.errno == errno.ENOMEM
    return any(text in str(e) for text in ("can't allocate memory", "not enough memory", "out of memory"))


def too_large(run: Run, phase: str, what: str, e: BaseException) -> str:
    """The message of an error for want of memory: where, how large, what would help, and what is not lost."""
    settings = OmegaConf.create(whole(run.cfg))
    missing = object()
    named = [
        f"{name} (now {'null' if value is None else str(value).lower() if isinstance(value, bool) else value})"
        for name in SMALLER.get(phase, ("algo.micro_tokens", "model.compute", "evaluate.batch_size"))
        if (value := OmegaConf.select(settings, name, default=missing)) is not missing
    ][:3]
    kept = saved(run.home)
    return (
        f"out of memory in phase {phase}{f' ({what})' if what else ''}: {(str(e).splitlines() or [type(e).__name__])[0][:160]} Change "
        f"{', '.join(named)}. "
        + (
            f"Nothing that was computed up to step {kept} is lost: it is saved in {run.home}."
            if kept >= 0
            else "No step was done yet."
        )
    )
