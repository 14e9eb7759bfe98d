"""A base whose linear layers are held in 4 bits (QLoRA, arXiv:2305.14314), and their weights back.

    w ~ absmax * nf4[code]      64 weights share an absmax, which is itself held in 8 bits

Refuses to know adapters and what trains them. The only file that imports bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


def quantize(model: PreTrainedModel) -> None:
    """Hold every linear layer in 4 bits; the output layer of a Policy and biases stay as read.

    On the CPU, where the model was read: the same files give the same bits on every rank and at
    every start, whatever the device is.
    """
    linear = [item for item in model.named_modules() if type(item[1]) is nn.Linear]
    for path, layer in linear:
        model.set_submodule(path, _in_4_bits(layer))
    model.is_loaded_in_4bit = True  # peft asks for this before it looks at the layers


class RoundedLinear(Linear4bit):
    """A linear layer that holds 4 bits and multiplies by the weights they stand for, no others.

    bitsandbytes' own product chooses between kernels that round in several ways, and keeps the 4
    bits for the backward pass where ZeRO-3 can neither free nor gather them.
    """

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.weight, self.bias)
        return product


class _Product(torch.autograd.Function):
    """x W' + b; the whole weights exist in neither pass for longer than the product takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)  # the parameter itself, which ZeRO-3 fills again
        return linear(x, dequantized(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ dequantized(weight), None, None  # weight and bias are frozen


def _in_4_bits(layer: nn.Linear) -> RoundedLinear:
    with torch.device("meta"):  # no room for weights that are replaced at once
        held = RoundedLinear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
        )
    held.weight = Params4bit(layer.weight.detach(), quant_type="nf4").to("cpu")  # quantises
    held.bias = layer.bias
    return held


def dequantized(weight: Tensor) -> Tensor:
    """What a layer multiplies by, in the dtype that was read; any other weight as it is."""
    if not isinstance(weight, Params4bit):
        return weight
    whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return whole
