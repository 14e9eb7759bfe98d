"""The parameters of a model cut over all ranks, for passes without gradient.

Each rank holds an equal part of every parameter; the whole exists while the module that owns it
runs. DeepSpeed's ZeRO-3 does as much for the policy, but would bring an engine of its own, whose
parts nobody else may change. Refuses to know what the model computes.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.functional import pad


class ModelParts:
    """Cuts a model in place. A pass is then collective: all ranks run the same modules in order."""

    def __init__(self, model: nn.Module) -> None:
        self._rank = torch.distributed.get_rank()
        self._ranks = torch.distributed.get_world_size()
        self._shapes = {weight: weight.shape for weight in model.parameters()}
        self._parts = {weight: self.cut(weight).clone() for weight in self._shapes}
        for weight in self._shapes:
            _empty(weight)
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._gather)
                module.register_forward_hook(self._release, always_call=True)  # out of memory, too

    def tensors(self) -> list[Tensor]:
        """This rank's parts; whoever moves them to a device moves the passes there."""
        return list(self._parts.values())

    def part(self, weight: Tensor) -> Tensor | None:
        """[n] what this rank holds of a parameter; None: it was not cut (a buffer)."""
        return self._parts[weight] if isinstance(weight, nn.Parameter) else None

    def cut(self, whole: Tensor) -> Tensor:
        """[n] this rank's part of a whole tensor, the last ranks' filled up with zeros.

        7 elements on 3 ranks: 3, 3, and 1 and two zeros.
        """
        size = -(-whole.numel() // self._ranks)
        part = whole.detach().flatten()[self._rank * size : (self._rank + 1) * size]
        return pad(part, (0, size - len(part)))

    def whole(self, part: Tensor, weight: Tensor) -> Tensor:
        """The tensor of a parameter's shape whose parts, one from each rank, these are."""
        shape = self._shapes[weight]
        flat = part.new_empty(self._ranks * len(part))
        torch.distributed.all_gather_into_tensor(flat, part)
        return flat[: shape.numel()].view(shape)

    def _gather(self, module: nn.Module, _: object) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = self.whole(self._parts[weight], weight)

    def _release(self, module: nn.Module, _: object, __: object) -> None:
        for weight in module.parameters(recurse=False):
            _empty(weight)


def _empty(weight: nn.Parameter) -> None:
    weight.data = weight.new_empty(0)
