"""Adapters added to the weights of a transformers model, over and over.

Refuses to know who trains them and which version they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grpo.errors import WeightMismatch
from grpo.types import AdapterShape

NAME_PREFIX = "base_model.model."  # peft's


class MergedAdapters:
    """Keeps the weights as they were read: what is added once could not be taken away exactly."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._as_read: dict[str, Tensor] = {}  # copies of those that adapters were added to

    @torch.no_grad()
    def add(self, adapters: Mapping[str, Tensor], shape: AdapterShape) -> None:
        """W + alpha / rank * B A in float32, in place of W, for all pairs of A and B."""
        for name, a in adapters.items():
            path, is_a, _ = name.removeprefix(NAME_PREFIX).partition(".lora_A.")
            if not is_a:
                continue
            weight = self._weight(path)
            before = self._as_read.setdefault(path, weight.clone())
            b = adapters[name.replace(".lora_A.", ".lora_B.")].to(weight.device)
            weight.copy_(before.float() + b @ a.to(weight.device) * (shape.alpha / shape.rank))

    def _weight(self, path: str) -> Tensor:
        try:
            layer = self._model.get_submodule(path)
        except AttributeError as error:
            raise WeightMismatch(f"adapters do not fit the model: {error}") from error
        if not isinstance(layer, nn.Linear):
            raise WeightMismatch(
                f"adapters do not fit the model: {path} is a {type(layer).__name__}, expected a "
                "linear layer; set learner.lora.publish: merged"
            )
        return layer.weight
