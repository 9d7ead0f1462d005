"""AdamW's state: where it lies during a run, and how it lies on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alignkit import ranks


class Offloaded(torch.optim.AdamW):
    """AdamW in the processor's memory (ZeRO-Offload, arXiv 2101.06840): the moments lie there, and a copy of the weights that is
    stepped on. Gradients go there, new weights come back; on the GPU only these two are left. The numbers are AdamW's. Whoever changes
    the weights otherwise makes a new one."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        copies = [{"params": [_there(p) for p in group["params"]]} for group in self.param_groups]
        self._there = torch.optim.AdamW(copies, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pairs = []
        for group, there in zip(self.param_groups, self._there.param_groups, strict=True):
            there["lr"] = group["lr"]
            pairs += list(zip(group["params"], there["params"], strict=True))
        for p, copy in pairs:
            if p.grad is None:
                copy.grad = None
                continue
            if copy.grad is None:
                copy.grad = _there(p.grad)
            else:
                copy.grad.copy_(p.grad, non_blocking=p.is_cuda)
        _wait(pairs)
        self._there.step()
        for p, copy in pairs:
            p.copy_(copy, non_blocking=p.is_cuda)
        _wait(pairs)  # the copies are stepped on again

    def state_dict(self) -> dict[str, Any]:
        return self._there.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._there.load_state_dict(state_dict)
        for group, there in zip(self.param_groups, self._there.param_groups, strict=True):
            group["lr"] = there["lr"]


def _there(x: Tensor) -> Tensor:
    """A copy in the processor's memory, of a GPU's tensor in pages that it can read and write by itself."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x.detach())


def _wait(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for device in {p.device for p, _ in pairs if p.is_cuda}:  # which need not be the current one
        torch.cuda.synchronize(device)


def state_of(optimizer: torch.optim.Optimizer, shards: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the ``state_dict``, of which one rank's is kept; and, where ranks share layers, the moments of this rank's part of their weights,
    ``{number of the weight}.{name}`` → its rows, which are no more in the former)."""
    state = optimizer.state_dict()
    own: dict[str, Tensor] = {}
    for i, p in enumerate(_weights(optimizer)):
        if shards and shards.is_part(p) and i in state["state"]:
            held = state["state"][i]
            own |= {f"{i}.{name}": x for name, x in held.items() if x.dim()}
            state["state"][i] = {name: x for name, x in held.items() if not x.dim()}
    return state, own


def own_name() -> str:
    """The file of this rank's rows, which in the order of the files' names are the whole."""
    return _name(ranks.rank() + 1, ranks.size())


def _name(number: int, count: int) -> str:
    return f"moments-{number:05d}-of-{count:05d}.safetensors"


def load(optimizer: torch.optim.Optimizer, shards: Any, folder: Path) -> None:
    """Read ``optimizer.pt`` and the files of moments, of any number of ranks, whether they shared layers or not; each rank reads
    what is its own.

    Raises:
        ValueError: they are of other weights, or not whole.
    """
    # a GPU may have no room for all of it
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    paths = sorted(folder.glob("moments-*.safetensors"))
    count = int(paths[-1].stem.rpartition("-")[2]) if paths else 0
    for i in range(1, count + 1):
        if not (folder / _name(i, count)).exists():
            raise ValueError(f"{_name(i, count)} is missing: the moments of AdamW are not whole")
    files = [safe_open(file, "pt") for file in paths]
    names = {key.partition(".")[2] for file in files for key in file.keys()}  # noqa: SIM118
    there = set(files[0].keys()) if files else set()
    for i, p in enumerate(_weights(optimizer)):
        if i not in state["state"]:
            continue
        own = shards.rows(p) if shards else slice(0, len(p) if p.dim() else 1)
        whole = {name: x[own].clone() if x.dim() else x for name, x in state["state"][i].items()}
        parts = {name: _rows(files, f"{i}.{name}", own) for name in names if f"{i}.{name}" in there}
        state["state"][i] = whole | parts
        held = state["state"][i]
        if "exp_avg" not in held or any(x.dim() and x.shape != p.shape for x in held.values()):
            raise ValueError("the moments of AdamW are not those of this model, or not whole")
    optimizer.load_state_dict(state)


def _rows(files: list[Any], key: str, wanted: slice) -> Tensor:
    """The wanted rows of a tensor whose rows lie in several files."""
    found: list[Tensor] = []
    at = 0
    for file in files:
        part = file.get_slice(key)
        count = part.get_shape()[0]
        start, stop = max(wanted.start - at, 0), min(wanted.stop - at, count)
        if start < stop or not found:  # of no rows, the shape at least
            found.append(part[start : max(start, stop)])
        at += count
    return torch.cat(found)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
