"""Weights as one safetensors image: how it is laid out, and the tensors that lie in it.

Both ends of a weight sync read and write in place here; safetensors' own functions would copy all
weights at each end. Refuses to know models and versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTH_BYTES = 8  # an image begins with the length of its header, little endian
ALIGNMENT = 64  # of the first weight: a cache line
METADATA = {"format": "pt"}  # transformers refuses safetensors files without it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def image_header(weights: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The first bytes of an image of such weights, and the size of the whole image."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    # Wide elements first, so that every weight begins at a multiple of its element's size.
    for name in sorted(weights, key=lambda name: (-weights[name].element_size(), name)):
        weight = weights[name]
        start, end = end, end + weight.numel() * weight.element_size()
        entries[name] = {
            "dtype": names[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, LENGTH_BYTES + len(text) + end


def tensors_in(image: NDArray[np.uint8]) -> dict[str, Tensor]:
    """The weights by name, in the image's own memory: write to them only if that is yours."""
    begin = LENGTH_BYTES + int.from_bytes(image[:LENGTH_BYTES].tobytes(), "little")
    entries = json.loads(image[LENGTH_BYTES:begin].tobytes())
    weights = torch.from_numpy(np.asarray(_Writable(image)))[begin:]
    return {
        name: weights.narrow(0, start, end - start)
        .view(DTYPES[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in entries.items()
        if name != "__metadata__"
        for start, end in [entry["data_offsets"]]
    }


class _Writable:
    """The same memory without the mark that it is read-only, of which torch would warn."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        self._image = image  # keeps the memory alive
        interface = image.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
