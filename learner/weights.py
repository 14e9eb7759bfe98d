"""A model's weights by name, on the CPU and in a folder for users.

Refuses to know the optimiser and the ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from grpo.types import DType
from grpo.weight_image import METADATA

# What a model folder holds beside its weights: configuration, tokenizer, chat template.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers under their names; a tied output layer is left out.

    Adapters are left out, too, and what they are added to has the name that it has without them.
    """
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in (*model.named_parameters(), *buffers.items())
        if ".lora_" not in name
    }


def trained_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What the optimiser moves, by name and in order; tied weights once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def to_cpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that no later step changes."""
    target = dtype if weight.is_floating_point() else weight.dtype
    return weight.detach().to("cpu", target, copy=True).contiguous()


def empty_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Room on the CPU for all weights of a model; what is no float keeps its type."""
    return {
        name: torch.empty(weight.shape, dtype=dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in named_weights(model).items()
    }


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], room: Mapping[str, Tensor]) -> None:
    """Copy weights into the tensors of the same names, in their type and on their device."""
    for name, weight in weights.items():
        room[name].copy_(weight)


def as_saved(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names and in the shapes that transformers writes to files."""
    return dict(revert_weight_conversion(model, weights))


def model_folder(model: str) -> Path:
    """Where the files beside the weights lie; for a hub id they come from its cache."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(model, allow_patterns=list(COMPANIONS)))


def export(weights: dict[str, Tensor], folder: Path, *, model: str, dtype: DType) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", METADATA)
    for pattern in COMPANIONS:
        for file in model_folder(model).glob(pattern):
            if not file.name.endswith(".index.json"):  # lists the shards of the source's weights
                shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)  # the old name of the same entry
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
