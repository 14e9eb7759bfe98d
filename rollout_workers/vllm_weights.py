"""Our side of vLLM's weight-transfer API: a backend that reads a safetensors image from a file.

Runs inside vLLM's workers, one per GPU; they import this module by name (`worker_extension_cls`),
which registers the backend there too. Knows nothing of who wrote the file.
"""

from __future__ import annotations

import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
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

BACKEND = "covey_file"


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is untyped to mypy
    """There is nothing to agree on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # as above
    """Where the image lies and what its bytes must sum up to (crc32)."""

    path: str
    checksum: int


class FileWeightTransfer(WeightTransferEngine[FileInit, FileUpdate]):  # type: ignore[misc]
    """Loads all weights from one file; leaves the model alone if its bytes are not as promised."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate
    received_checksum: int

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to set up: every update names its own file."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # vLLM's own implementation of this method fails on the CPU in this call.
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.received_checksum = _crc32(Path(update_info.path))
        if self.received_checksum != update_info.checksum:
            return
        with safe_open(update_info.path, framework="pt") as image:
            names = image.keys()
            self.model.load_weights((name, image.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_heads(self.model)

    def shutdown(self) -> None:
        """Holds nothing between updates."""


def _crc32(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        return zlib.crc32(image)


def _repack_heads(model: torch.nn.Module) -> None:
    """Pack output layers anew from the weights they share with the embedding.

    On the CPU a linear layer computes from a packed copy. vLLM's reload repacks every layer that
    received weights; a tied head receives none, and would silently go on with the old policy.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class ReceivedChecksum:
    """Mixed into vLLM's worker class: lets the rollout worker ask what arrived there."""

    weight_transfer_engine: FileWeightTransfer

    def received_checksum(self) -> int:
        return self.weight_transfer_engine.received_checksum


if BACKEND not in WeightTransferEngineFactory._registry:  # a reload of this module is harmless
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
