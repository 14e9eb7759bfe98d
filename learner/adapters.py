"""Low-rank adapters (LoRA, arXiv:2106.09685) inside a model: added, switched off, merged.

    y = W x + alpha / rank * B (A x)        A [rank, in] random, B [out, rank] zero at first

Refuses to know what trains them and who reads merged weights. The only file that imports peft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.errors import UserError
from grpo.weight_image import METADATA
from learner.config import LoraConfig

ADAPTER = "default"  # peft's name of a model's only set of adapters
ADAPTER_FILE = "adapter_model.safetensors"
NAME_PREFIX = "base_model.model."  # of every weight in such a file


class LowRankAdapters:
    """Those of one model; the base is frozen, and they are of float32 whatever its dtype is."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LoraConfig,
        *,
        name: str,
        whole: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`name` is the model's, for messages; peft draws A from torch's generator.

        `whole` gives the weight that a layer multiplies by from the one that it holds; None: the
        two are the same.
        """
        refuse_unknown_modules(model, config, name)
        is_all = config.target_modules == "all-linear"
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=config.target_modules if is_all else [*config.target_modules],
            lora_dropout=config.dropout,
            task_type="CAUSAL_LM",
            base_model_name_or_path=name,
        )
        peft.inject_adapter_in_model(settings, model, ADAPTER)  # resolves all-linear to names
        self._settings = settings
        self._whole = whole
        self._layers: dict[str, LoraLayer] = {
            f"{path}.weight": module
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        for weight in self.weights():
            weight.data = weight.data.float()  # peft gives them the base's dtype

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without them, until the context ends. Not between forward and backward pass."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def weights(self) -> list[nn.Parameter]:
        """Every A and B."""
        return list(self.named_weights().values())

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Every A and B under the name that it has in the files of peft."""
        return {
            f"{NAME_PREFIX}{name.removesuffix('weight')}{kind}.weight": matrices[ADAPTER].weight
            for name, layer in self._layers.items()
            for kind, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        }

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """A folder that peft.PeftModel.from_pretrained and vLLM's LoRARequest load."""
        self._settings.save_pretrained(str(folder))
        save_file(weights, folder / ADAPTER_FILE, METADATA)

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + alpha / rank * B A in float32; a weight that has no adapter as it is, but whole."""
        weight = weight if self._whole is None else self._whole(weight)
        if name not in self._layers:
            return weight
        added: Tensor = self._layers[name].get_delta_weight(ADAPTER)
        return weight.float() + added


def refuse_unknown_modules(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Every name must be the end of some linear layer's: peft ignores one that is not."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in () if config.target_modules == "all-linear" else config.target_modules:
        if not any(f".{path}".endswith(f".{target}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise UserError(
                f"learner.lora.target_modules names {target!r}, which is no linear layer of "
                f"{name}; expected all-linear or some of: {', '.join(known)}"
            )
