"""Our side of vLLM's weight-transfer API: a backend that reads a safetensors image.

Runs inside vLLM's workers, one per GPU; they import this module by name (`worker_extension_cls`),
which registers the backend there too. Knows nothing of who wrote the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from grpo.weight_image import tensors_in
from rollout_workers.vllm_adapters import AdapterSlot

BACKEND = "covey_image"


@dataclass
class ImageInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is untyped to mypy
    """There is nothing to agree on beforehand."""


@dataclass
class ImageUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # as above
    """The image, or the file that holds it, and what its bytes must sum up to (xxh3_64)."""

    image: NDArray[np.uint8] | Path  # a path where vLLM's workers are processes of their own
    checksum: int


class ImageTransfer(WeightTransferEngine[ImageInit, ImageUpdate]):  # type: ignore[misc]
    """Loads all weights of one image; leaves the model alone if its bytes are not as promised."""

    init_info_cls = ImageInit
    update_info_cls = ImageUpdate
    received_checksum: int

    def init_transfer_engine(self, init_info: ImageInit) -> None:
        """Nothing to set up: every update brings its own image."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # vLLM's own implementation of this method fails on the CPU in this call.
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ImageUpdate) -> None:
        image = update_info.image
        if isinstance(image, Path):
            image = np.memmap(image, np.uint8, "r")
        self.received_checksum = xxhash.xxh3_64_intdigest(image)
        if self.received_checksum == update_info.checksum:
            self.model.load_weights(tensors_in(image).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_heads(self.model)

    def shutdown(self) -> None:
        """Holds nothing between updates."""


def _repack_heads(model: torch.nn.Module) -> None:
    """Pack output layers anew from the weights they share with the embedding.

    On the CPU a linear layer computes from a packed copy. vLLM's reload repacks every layer that
    received weights; a tied head receives none, and would silently go on with the old policy.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension(AdapterSlot):
    """Mixed into vLLM's worker class: lets the rollout worker ask what arrived there."""

    weight_transfer_engine: ImageTransfer

    def received_checksum(self) -> int:
        return self.weight_transfer_engine.received_checksum


if BACKEND not in WeightTransferEngineFactory._registry:  # a reload of this module is harmless
    WeightTransferEngineFactory.register_engine(BACKEND, ImageTransfer)
