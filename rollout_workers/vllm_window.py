"""Which vLLM the engine works with, checked before anything slow or version-dependent is imported.

Refuses to know what the interfaces are used for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.util import find_spec

from grpo.errors import UserError

# vLLM's weight-transfer API has this shape from 0.26 on; the tests run 0.32.
OLDEST_VLLM = (0, 26)
NEWEST_VLLM = (0, 32)

TRANSFER = "vllm.distributed.weight_transfer"
# What the weight sync calls and extends, by module; another build may lack some at any version.
INTERFACES = {
    f"{TRANSFER}.base": (
        "WeightTransferEngine.start_weight_update",
        "WeightTransferEngine.update_weights",
        "WeightTransferEngine.receive_weights",
        "WeightTransferEngine.finish_weight_update",
        "WeightTransferEngine.parse_update_info",
        "WeightTransferInitInfo",
        "WeightTransferUpdateInfo",
    ),
    f"{TRANSFER}.factory": (
        "WeightTransferEngineFactory.register_engine",
        "WeightTransferEngineFactory._registry",
    ),
    "vllm.config": ("WeightTransferConfig",),
    "vllm.model_executor.model_loader.reload": (
        "initialize_layerwise_reload",
        "finalize_layerwise_reload",
    ),
    "vllm.v1.engine.llm_engine": ("LLMEngine.collective_rpc", "LLMEngine.reset_prefix_cache"),
    "vllm.v1.worker.gpu_worker": (  # vLLM's CPU worker is made from it
        "Worker.init_weight_transfer_engine",
        "Worker.start_weight_update",
        "Worker.update_weights",
        "Worker.finish_weight_update",
    ),
}
# What adapters beside the weights need (vllm_adapters.py).
ADAPTER_INTERFACES = {
    "vllm.lora.layers.base_linear": ("BaseLinearLayerWithLoRA.set_mapping",),
    "vllm.lora.lora_model": ("LoRAModel.from_lora_tensors",),
    "vllm.lora.model_manager": (
        "LoRAModelManager.activate_adapter",
        "LoRAModelManager.add_adapter",
        "LoRAModelManager.create_dummy_lora",
        "LoRAModelManager.remove_adapter",
    ),
    "vllm.lora.peft_helper": ("PEFTHelper",),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.model_executor.models.utils": ("WeightsMapper.get_rename_mapper",),
}
REMEDY = "or set rollout.engine to transformers"


def require_vllm(*, with_adapters: bool) -> None:
    """Refuse a vLLM that is missing, outside the window, or without what the weight sync needs."""
    if find_spec("vllm") is None:
        raise UserError(
            f"vLLM is not installed: install {_window()}, {REMEDY} for a tiny model on the CPU"
        )
    check_version(importlib.import_module("vllm").__version__)
    check_interfaces()
    if with_adapters:
        check_interfaces(ADAPTER_INTERFACES)


def check_version(version: str) -> None:
    """Refuse a vLLM whose interfaces were not checked."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_VLLM <= found <= NEWEST_VLLM:
        raise UserError(
            f"vLLM {version} is installed, but covey works with {_window()}: install one of these, "
            f"{REMEDY}"
        )


def check_interfaces(interfaces: Mapping[str, Sequence[str]] = INTERFACES) -> None:
    """Refuse a vLLM that lacks a part of what the weight sync calls, and name the part."""
    missing = [
        f"{module}.{name}"
        for module, names in interfaces.items()
        for name in names
        if not _exists(module, name)
    ]
    if missing:
        raise UserError(
            f"this build of vLLM has no {', '.join(missing)}, which the weight sync needs: "
            f"install an official build of {_window()}, {REMEDY}"
        )


def _exists(module: str, name: str) -> bool:
    try:
        reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


def _window() -> str:
    return "vLLM " + " to ".join(".".join(map(str, edge)) for edge in (OLDEST_VLLM, NEWEST_VLLM))
