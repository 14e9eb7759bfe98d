"""Our side of vLLM's weight-transfer API: a backend that reads a safetensors image or a stream.

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

from grpo.errors import WeightMismatch
from grpo.weight_image import tensors_in
from grpo.weight_stream import WeightStream
from rollout_workers.vllm_adapters import AdapterSlot
from rollout_workers.weight_receiver import WeightReceiver

BACKEND = "covey_image"


@dataclass
class ImageInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is untyped to mypy
    """There is nothing to agree on beforehand."""


@dataclass
class ImageUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # as above
    """The image, or the file that holds it, and what its bytes must sum up to (xxh3_64)."""

    image: NDArray[np.uint8] | Path  # a path where vLLM's workers are processes of their own
    checksum: int


@dataclass
class StreamUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # as above
    """Where all weights of a version come from, each bucket with a sum of its own."""

    stream: WeightStream


class ImageTransfer(WeightTransferEngine[ImageInit, ImageUpdate]):  # type: ignore[misc]
    """Loads all weights of one image; leaves the model alone if its bytes are not as promised.

    A stream is loaded as it comes: one that fails leaves weights that nobody may sample from.
    """

    init_info_cls = ImageInit
    update_info_cls = ImageUpdate
    received_checksum: int
    stream_failure: str | None  # None: every bucket is loaded
    _receiver: WeightReceiver | None = None  # None: init_transfer_engine() has still to come

    def init_transfer_engine(self, init_info: ImageInit) -> None:
        """Nothing to agree on: every update brings its image or says where weights come from."""
        self._receiver = WeightReceiver(self.device)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        if "stream" in update_info:
            self._receive_stream(StreamUpdate(**update_info).stream)
        else:
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

    def _receive_stream(self, stream: WeightStream) -> None:
        """Raises nothing: vLLM would not put a half-loaded model together again."""
        assert self._receiver is not None, "VllmBatch sets it up"
        self.stream_failure = None
        try:
            for weights in self._receiver.buckets(stream, process=self.parallel_config.rank):
                self.model.load_weights(weights.items())
        except (RuntimeError, WeightMismatch) as error:
            self._receiver.leave()
            self.stream_failure = str(error).partition("\n")[0]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_heads(self.model)

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.leave()


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

    def stream_failure(self) -> str | None:
        return self.weight_transfer_engine.stream_failure


if BACKEND not in WeightTransferEngineFactory._registry:  # a reload of this module is harmless
    WeightTransferEngineFactory.register_engine(BACKEND, ImageTransfer)
