"""Weights straight from the learner into the rollout workers: what both ends must agree on.

Weights travel in buckets, each one flat buffer that is broadcast within a group of its own: the
sender, and all processes of all rollout workers. What a bucket holds is told through the store
where the group has met. Refuses to know models, and who sends when.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch marks no re-export

from grpo.weight_image import ALIGNMENT, DTYPES

SENDER = 0  # rank in the group
# A member that waits longer, for the others to come or for the next bucket, has lost one.
PATIENCE = timedelta(seconds=60)
CHECKED_WORDS = 2**22  # of a bucket at a time, as the sum takes twice their memory
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Where processes meet once; they stay together until one of them is missing."""

    host: str
    port: int
    size: int  # the sender and all processes of all rollout workers


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


def opened_store(host: str) -> TCPStore:
    """The sender's store, at a free port of its node."""
    return TCPStore(host, 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)


def joined_store(group: WeightGroup) -> TCPStore:
    """The same store, as the other members see it."""
    return TCPStore(group.host, group.port, timeout=PATIENCE)


class Membership:
    """This process in a group; what fails is a RuntimeError, after PATIENCE at most.

    Apart from torch's default group, which the learner's ranks and vLLM's workers have already.
    """

    def __init__(
        self, store: TCPStore, group: WeightGroup, *, rank: int, device: torch.device
    ) -> None:
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = (
                2 * PATIENCE
            )  # torch's own watch would end this process: we are first
            self._group = dist.ProcessGroupNCCL(store, rank, group.size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, group.size, PATIENCE)

    def broadcast(self, bucket: Tensor) -> None:
        """The sender's bytes in everybody's bucket, all of one size."""
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        self._group.broadcast([bucket], options).wait(PATIENCE)

    def abort(self) -> None:
        """Leave at once; whoever waits for this process learns of it."""
        self._group.abort()
