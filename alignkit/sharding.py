"""FSDP2: every rank keeps a part of each layer, and of what AdamW knows of it, instead of all.

The layers are *apart* in an update: ``fully_shard`` brings each together for its own forward and backward pass and sums its
gradient into the parts, which all ranks have to do equally often (``ranks.in_step``). For everything else, sampling, evaluating and
saving, they are *whole*: the model is a plain one, on every rank. What is no layer (embeddings, last norm, head) every rank has in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alignkit import ranks
from alignkit.errors import UserError
from alignkit.reader import compute_in, layers_of


class Shards:
    """The layers of some modules, and of each trained weight the part that is this rank's."""

    def __init__(self, modules: Sequence[torch.nn.Module], compute: torch.dtype) -> None:
        """
        Args:
            compute: precision of the layers' passes; gradients add up in that of the weights.

        Raises:
            UserError: a model without layers that can be told.
        """
        found = layers_of(modules)
        if not found:
            raise UserError(
                f"run.shard=true: {type(modules[0]).__name__} has no layers that transformers tells. Set run.shard=false."
            )
        drops = [m for module in modules for m in module.modules() if getattr(m, "layerdrop", 0.0)]
        if drops:
            raise UserError(
                f"run.shard=true: {type(drops[0]).__name__} drops layers (layerdrop), and each process would drop others. Set "
                "model.config.encoder_layerdrop=0 model.config.decoder_layerdrop=0, or those of the model's own configuration."
            )
        mesh = init_device_mesh(next(found[0].parameters()).device.type, (ranks.size(),))
        self._layers: list[FSDPModule] = []
        for layer in found:
            compute_in(layer, compute)
            sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)  # sums, which are divided once, by what all ranks have counted
            sharded.set_force_sum_reduction_for_comms(True)
            self._layers.append(sharded)
        self._own: dict[int, tuple[DTensor, torch.nn.Parameter]] = {}
        self._hooks: list[tuple[Any, Any]] = []
        self._apart = True
        ranks.go_in_step(True)

    def own(self, p: torch.nn.Parameter) -> torch.nn.Parameter:
        """What an optimizer holds of a weight: this rank's part, which shares its memory; all of one that is no layer's."""
        if not isinstance(p, DTensor):
            return p
        part = torch.nn.Parameter(p.to_local().detach())
        self._own[id(part)] = (p, part)
        return part

    def is_part(self, p: Tensor) -> bool:
        """Whether it is what ``own`` has given of a layer's weight."""
        return id(p) in self._own

    def whole_of(self, p: Tensor) -> Tensor:
        """The layer's weight of which it is a part, with the shape of the whole; another weight itself."""
        return self._own[id(p)][0] if id(p) in self._own else p

    @staticmethod
    def is_apart(p: Tensor) -> bool:
        """Whether it is a layer's weight of which each rank has its part now."""
        return isinstance(p, DTensor)

    def apart(self) -> None:
        """Each rank keeps its part alone."""
        if self._apart:
            return
        for held, kept in self._hooks:
            held.update(kept)
        for layer in self._layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
        self._apart = True
        ranks.go_in_step(True)

    def whole(self) -> None:
        """Each rank has all, and ``state_dict`` gives it. To be called by all of them."""
        if not self._apart:
            return
        self._hooks = []
        for layer in self._layers:
            layer.unshard()
            layer.set_reshard_after_forward(False)
            assert isinstance(layer, torch.nn.Module)
            for module in layer.modules():  # FSDP's own, which would take the layers apart again
                hooks = (
                    module._state_dict_pre_hooks,
                    module._load_state_dict_pre_hooks,
                    module._load_state_dict_post_hooks,
                )
                for held in hooks:
                    self._hooks.append((held, dict(held)))
                    held.clear()
        self._apart = False
        ranks.go_in_step(False)

    def rows(self, p: Tensor) -> slice:
        """Which rows (entries of the first dimension) of a weight what ``own`` has given holds: all of one that is no layer's."""
        if not self.is_part(p):
            return slice(0, len(p) if p.dim() else 1)
        count = self.whole_of(p).shape[0]
        each = -(-count // ranks.size())
        return slice(min(count, each * ranks.rank()), min(count, each * (ranks.rank() + 1)))

    def take_gradients(self) -> None:
        """Hand the gradients of an update to the parts that the optimizer holds."""
        for p, part in self._own.values():
            if p.grad is not None:
                assert isinstance(p.grad, DTensor)
                part.grad, p.grad = p.grad.to_local(), None
