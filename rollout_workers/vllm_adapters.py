"""Adapters inside vLLM's workers: always one set, replaced in place from a safetensors image.

Every request runs under them, so a swap changes running requests, too. Knows nothing of who wrote
the image, nor which version it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from grpo.types import AdapterShape
from grpo.weight_image import tensors_in

# Has no path that vLLM could read: the adapters of this id are always in place.
THE_ADAPTERS = LoRARequest("policy", 1, "in memory")


class AdapterSlot:
    """Mixed into vLLM's worker class: makes room for the adapters and fills it."""

    model_runner: Any

    def prepare_adapters(self, layers: Sequence[str], rank: int) -> list[str]:
        """Put adapters that add nothing beside these layers; those for which vLLM has no place."""
        slots = self._slots
        names = [name for name in slots.modules if name not in slots.packed_modules]
        names += [name for parts in slots.packed_modules.values() for name in parts]
        missing = [layer for layer in layers if self._in_vllm(layer) not in names]
        if not missing:
            self._put(slots.create_dummy_lora(THE_ADAPTERS.lora_int_id, rank, {}))
            if slots.device.type == "cpu":
                _multiply_whole(slots)
        return missing

    def receive_adapters(
        self, image: NDArray[np.uint8] | Path, checksum: int, shape: AdapterShape
    ) -> int:
        """Use the adapters of an image from now on, if its bytes sum up to `checksum`; their sum.

        Where it is another the old ones stay.
        """
        if isinstance(image, Path):
            image = np.memmap(image, np.uint8, "r")
        received = xxhash.xxh3_64_intdigest(image)
        if received == checksum:
            self._put(self._loaded(tensors_in(image), shape))
        return received

    def _loaded(self, weights: dict[str, Tensor], shape: AdapterShape) -> LoRAModel:
        slots = self._slots
        return LoRAModel.from_lora_tensors(
            THE_ADAPTERS.lora_int_id,
            {name: weight.clone() for name, weight in weights.items()},  # vLLM scales B in place
            PEFTHelper(r=shape.rank, lora_alpha=shape.alpha, target_modules=shape.target_modules),
            device="cpu",
            dtype=slots.lora_config.lora_dtype,
            weights_mapper=_renames(slots),
        )

    def _put(self, adapters: LoRAModel) -> None:
        slots = self._slots
        slots.remove_adapter(adapters.id)
        slots.add_adapter(adapters)
        slots.activate_adapter(adapters.id)

    def _in_vllm(self, layer: str) -> str:
        mapper = _renames(self._slots)
        return layer if mapper is None else mapper._map_name(layer)

    @property
    def _slots(self) -> LoRAModelManager:
        return self.model_runner.lora_manager._adapter_manager


def _renames(slots: LoRAModelManager) -> Any:
    """From the names of transformers' layers to vLLM's; None: they are the same."""
    mapper = getattr(slots.model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def _multiply_whole(slots: LoRAModelManager) -> None:
    """On the CPU vLLM copies A and B anew for every token, as each may have adapters of its own.

    Here all have the same. With 10M parameters and rank 16 whole products make a prompt pass ten
    times faster.
    """
    for layer in slots.modules.values():
        if isinstance(layer, BaseLinearLayerWithLoRA):
            layer.set_mapping(_WholeProducts())


class _WholeProducts:
    """The part of vLLM's punica wrapper that a linear layer calls."""

    def add_lora_linear(
        self,
        output: Tensor,  # [T, out], changed in place
        inputs: Tensor,  # [T, in]
        a: tuple[Tensor, ...],  # of each slice of the output: [1, 1, rank, in]
        b: tuple[Tensor, ...],  # [1, 1, out of the slice, rank], alpha / rank within
        scale: float,
        slices: tuple[int, ...],
    ) -> None:
        start = 0
        for down, up, size in zip(a, b, slices, strict=True):
            low = inputs.to(down.dtype) @ down[0, 0].T
            added = torch.nn.functional.linear(low, up[0, 0]).mul_(scale)
            output[:, start : start + size] += added.to(output.dtype)
            start += size
