"""The processes of a run: each holds the whole batch and the same weights, and they share out the passes through the model.

Every rank draws the same rows and, once a step's responses are sampled, scored and judged, holds the same whole batch: so
a method, its baselines and its statistics know nothing of ranks. What is shared out is work: whole groups of rows to sample and to
judge, micro-batches to score and to learn from. An update sums the gradients of all ranks, once, before its one division. A rank
without a group or a micro-batch adds nothing and waits for no one. In a single process every function here is the plain thing.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignkit import processes
from alignkit.batch import Batch
from alignkit.errors import UserError

T = TypeVar("T")
BUCKET = 2**24  # elements of gradients that are summed in one message
_alone = False  # within ``alone``: this rank does something by itself
_patience: float | None = None  # of the present run, for ``watch``
_in_step = False  # the layers of the model are apart: every pass through it is one of all ranks


class Elsewhere(RuntimeError):
    """Another process of the run has failed, and tells why."""


@contextmanager
def joined(patience: float | None) -> Iterator[None]:
    """Meet the other processes, at the first run for good.

    Args:
        patience: seconds that may pass without a message, a pass through a model or the end of a phase; None: any number.

    Raises:
        UserError: they cannot be met.
    """
    global _patience
    _patience = patience
    processes.met = True
    cuda = torch.cuda.is_available()
    if cuda:
        there, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > there:
            raise UserError(f"{here} processes on a machine of {there} GPUs: each takes one. Start {there}.")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        if not dist.is_initialized():
            wait = timedelta(seconds=2 * patience if patience else 10**6)  # the watchdog tells first
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=wait)
            atexit.register(_part)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"the processes cannot meet: {str(e).splitlines()[0]} Start them with run.processes=N, torchrun or accelerate launch."
        ) from None
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        if not first():  # what all would say, the first one says
            sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.stdout, sys.stderr = streams


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many share the work here and now: 1 within ``alone``."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    return 0 if _alone or not dist.is_initialized() else dist.get_rank()


def first() -> bool:
    """Whether this process keeps the run's record."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """What is done within is this rank's own share: nothing in it is shared out again."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


# ---- sharing out -----------------------------------------------------------------------------------------------------


def share(count: int) -> range:
    """This rank's part of ``count`` things in a row, as even as can be; empty where there are fewer than ranks."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def dealt(things: Sequence[T]) -> list[tuple[T, bool]]:
    """This rank's things, dealt in turns, each with True. Where all have to go in step, some have the last thing again, with False:
    its pass counts for nothing."""
    own = [(thing, True) for thing in things[rank() :: size()]]
    rounds = -(-len(things) // size())
    return own + [(things[-1], False)] * (rounds - len(own) if _in_step else 0)


def go_in_step(on: bool) -> None:
    """From now on, or no longer, every rank runs the model equally often (``sharding``)."""
    global _in_step
    _in_step = on


def in_step() -> bool:
    """Whether a pass through the model must be made of as many calls, whatever the rows are."""
    return _in_step


def split(batch: Batch, budget: int) -> list[Batch]:
    """Micro-batches of at most ``budget`` tokens, smaller ones where some rank would be without otherwise."""
    if size() > 1:
        tokens = int(batch.prompt_mask[batch.group_starts()].sum() + batch.mask.sum())
        budget = min(budget, max(1, tokens // size()))
    return batch.split(budget)


def groups(batch: Batch) -> Batch | None:
    """This rank's part of a batch, whole groups in order; None where it has none."""
    if size() == 1:
        return batch
    starts = [*batch.group_starts().tolist(), len(batch)]
    mine = share(len(starts) - 1)
    if not len(mine):
        return None
    return batch.take(torch.arange(starts[mine.start], starts[mine.stop], device=batch.mask.device))


# ---- bringing together -----------------------------------------------------------------------------------------------


def together(own: T) -> list[T]:
    """What every rank has, in their order; tensors come back on the processor."""
    if size() == 1:
        return [own]
    watch()
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, _on_cpu(own))
    return found


def each(work: Callable[[], T]) -> list[T]:
    """What every rank's share of the work gives, in their order. No rank waits for one that has failed; only where layers are apart,
    and its pass is one of all ranks, it leaves at once, and they with it.

    Raises:
        UserError: one rank's; all ranks raise the same.
        Elsewhere: another rank has failed in another way; it raises its own error.
    """
    if size() == 1:
        return [work()]
    if _in_step:  # the others are in the middle of a layer: a message beside theirs would meet none, or the wrong one
        with alone():
            own = work()
        return together(own)
    wrong: Exception | None = None
    found: Any = None
    try:
        with alone():
            found = work()
    except Exception as e:
        wrong = e
    every = together((wrong is not None, str(wrong) if isinstance(wrong, UserError) else None, found))
    told = next((text for _, text, _ in every if text is not None), None)
    if told is not None:
        raise UserError(told)
    if wrong is not None:
        raise wrong
    if any(failed for failed, _, _ in every):
        raise Elsewhere("another process of the run has failed")
    return [one for _, _, one in every]


def agreed(value: T) -> T:
    """What the first rank has found out, on all."""
    return together(value)[0]


def any_of(flag: bool) -> bool:
    """Whether it holds on some rank."""
    return any(together(flag))


def summed(x: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if size() > 1:
        watch()
        dist.all_reduce(x)
    return x


def begin_alike(tensors: Sequence[Tensor]) -> None:
    """Give all ranks the first one's values."""
    if size() > 1:
        for x in tensors:
            dist.broadcast(x.data, 0)


def barrier() -> None:
    """Wait until all are here."""
    together(None)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all ranks. One that no rank has a gradient of stays without."""
    if size() == 1:
        return
    has = summed(torch.tensor([float(p.grad is not None) for p in parameters]))
    held = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
    for p in held:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket: list[Tensor] = []
    for i, p in enumerate(held):
        assert p.grad is not None
        bucket.append(p.grad)
        last = i + 1 == len(held) or held[i + 1].grad.dtype != p.grad.dtype  # type: ignore[union-attr]
        if last or sum(g.numel() for g in bucket) >= BUCKET:
            flat = summed(torch.cat([g.flatten() for g in bucket]))
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def _on_cpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, dict):
        return {k: _on_cpu(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_on_cpu(v) for v in x)
    return x


# ---- the watchdog ----------------------------------------------------------------------------------------------------


def watch() -> None:
    """From now on ``patience`` seconds may pass until the next call: of a pass through a model, before a message, at either end of
    a phase. After them the stacks of all threads are written and the process ends."""
    if dist.is_initialized() and _patience:
        faulthandler.dump_traceback_later(_patience, exit=True, file=sys.__stderr__ or 2)
