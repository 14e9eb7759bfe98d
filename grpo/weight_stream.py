"""Weights straight from the learner into the rollout workers: what both ends must agree on.

Weights travel in buckets, each one flat buffer. What a bucket holds is told through the store where
the group of both ends has met. Refuses to know models, and who sends when.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from grpo.weight_group import WeightGroup
from grpo.weight_image import ALIGNMENT, DTYPES

CHECKED_WORDS = 2**22  # of a bucket at a time, as the sum takes twice their memory
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStream:
    """One version on its way to one rollout worker."""

    group: WeightGroup
    first_rank: int  # of this worker's processes
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A weight within a bucket."""

    name: str
    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    start: int  # byte

    def view(self, bucket: Tensor) -> Tensor:
        """The weight, in the bucket's own memory."""
        dtype = DTYPES[self.dtype]
        part = bucket.narrow(0, self.start, prod(self.shape) * dtype.itemsize)
        return part.view(dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the sender says of the next bucket; one without entries ends the version."""

    entries: Sequence[Entry] = ()
    num_bytes: int = 0
    checksum: int = 0
    failure: str | None = None  # not None: the sender has given up, and nothing more comes

    def text(self) -> str:
        entries = [[e.name, e.dtype, e.shape, e.start] for e in self.entries]
        return json.dumps([entries, self.num_bytes, self.checksum, self.failure])

    @classmethod
    def read(cls, text: bytes) -> Told:
        entries, num_bytes, found, failure = json.loads(text)
        return cls(
            entries=[
                Entry(name=name, dtype=dtype, shape=tuple(shape), start=start)
                for name, dtype, shape, start in entries
            ],
            num_bytes=num_bytes,
            checksum=found,
            failure=failure,
        )


def bucket_key(version: int, bucket: int) -> str:
    """Under which the store tells of a bucket."""
    return f"weights/{version}/{bucket}"  # gloo has numbers of its own in the same store


def room(weight: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a weight takes in a bucket: a multiple of ALIGNMENT."""
    return -(-weight.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def bucket_sum(bucket: Tensor) -> int:
    """Sum of word * (2 * position + 1) modulo 2^64, over a bucket's words of 8 bytes.

    Computed where the bucket lies, and exact in any order: both ends find the same on any device.
    A word that differs always shows, as an odd factor maps no difference to 0.
    """
    words = bucket.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=bucket.device)
    for start in range(0, len(words), CHECKED_WORDS):
        part = words[start : start + CHECKED_WORDS]
        factors = torch.arange(start, start + len(part), device=bucket.device).mul_(2).add_(1)
        total += factors.mul_(part).sum()
    return int(total) % 2**64
