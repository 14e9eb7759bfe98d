"""Which layers of a model get adapters, from its configuration alone: no weights are read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import UserError
from grpo.types import AdapterShape


def adapted_layers(model: str, adapters: AdapterShape) -> list[str]:
    """The paths of the linear layers that are meant; every name must mean one."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = built.get_output_embeddings()
    ranks = {  # of a weight: what its adapter cannot exceed
        path: min(module.in_features, module.out_features)
        for path, module in built.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    layers = _meant([*ranks], model, adapters)
    largest = max(ranks[path] for path in layers)
    if adapters.rank > largest:
        raise UserError(
            f"learner.lora.rank is {adapters.rank}, but the weights it adapts in {model} have rank "
            f"{largest} at most, so more of it adds only memory: lower it, 16 is usual, or leave "
            "learner.lora out to train all weights"
        )
    return layers


def _meant(linear: list[str], model: str, adapters: AdapterShape) -> list[str]:
    """Of the linear layers those that the target modules name."""
    if adapters.target_modules == "all-linear":
        return linear
    for target in adapters.target_modules:
        if not any(f".{path}".endswith(f".{target}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise UserError(
                f"learner.lora.target_modules names {target!r}, which is no linear layer of "
                f"{model}; expected all-linear or some of: {', '.join(known)}"
            )
    ends = tuple(f".{target}" for target in adapters.target_modules)
    return [path for path in linear if f".{path}".endswith(ends)]
