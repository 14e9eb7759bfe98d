"""Weights straight from the learner into the rollout workers: what both ends must agree on.

Weights travel in buckets, each one flat buffer that is handed to a group of its own: a sender, and
processes of rollout workers. What a bucket holds is told through the store where the group has met.
Refuses to know models, and who sends when.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch marks no re-export
from torch.multiprocessing import set_sharing_strategy  # registers how tensors are handed over

from grpo.weight_image import ALIGNMENT, DTYPES

SENDER = 0  # rank in the group
# A member that waits longer, for the others to come or for the next bucket, has lost one.
PATIENCE = timedelta(seconds=60)
CHECKED_WORDS = 2**22  # of a bucket at a time, as the sum takes twice their memory
LEFT, TAKEN = "left", "taken"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Where processes meet once; they stay together until one of them is missing."""

    host: str
    port: int
    size: int  # the sender and all processes of its rollout workers
    is_local: bool = False  # all can open the sender's memory: one GPU, or the CPUs of one node


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


class Membership(Protocol):
    """This process in a group; what fails is a RuntimeError, after PATIENCE at most."""

    def broadcast(self, bucket: Tensor) -> None:
        """The sender's bytes in everybody's bucket, all of one size."""
        ...

    def abort(self) -> None:
        """Leave at once; whoever waits for this process learns of it."""
        ...


def joined(store: TCPStore, group: WeightGroup, *, rank: int, device: torch.device) -> Membership:
    """This process's own place in a group."""
    if group.is_local:
        return SharedMembership(store, group.size, rank=rank, device=device)
    return NetworkMembership(store, group, rank=rank, device=device)


class NetworkMembership:
    """By NCCL between GPUs, by gloo between CPUs.

    Apart from torch's default group, which the learner's ranks and vLLM's workers have already.
    """

    def __init__(
        self, store: TCPStore, group: WeightGroup, *, rank: int, device: torch.device
    ) -> None:
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            # torch's own watch would end this process: we are first
            options._timeout = 2 * PATIENCE
            self._group = dist.ProcessGroupNCCL(store, rank, group.size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, group.size, PATIENCE)

    def broadcast(self, bucket: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        self._group.broadcast([bucket], options).wait(PATIENCE)

    def abort(self) -> None:
        self._group.abort()


class SharedMembership:
    """The sender's bucket is opened and copied where it lies: CUDA IPC on a GPU, /dev/shm on a CPU.

    The sender fills it again once every member has said that it has its copy.
    """

    def __init__(self, store: TCPStore, size: int, *, rank: int, device: torch.device) -> None:
        self._store = store
        self._size = size
        self._rank = rank
        self._device = device
        self._number = 0  # of the bucket

    def broadcast(self, bucket: Tensor) -> None:
        if self._rank == SENDER:
            self._lend(bucket)
        else:
            self._copy(bucket)
        self._number += 1

    def abort(self) -> None:
        with suppress(RuntimeError):  # the store went with its sender
            for number in (self._number, self._number + 1):
                self._store.set(self._key(number, self._rank), LEFT)

    def _lend(self, bucket: Tensor) -> None:
        self._finish()
        if self._device.type == "cpu":
            # The default hands over a file descriptor, which needs a socket of its own.
            set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]  # torch's
        handle = base64.b64encode(ForkingPickler.dumps(bucket)).decode()
        self._store.set(self._key(self._number, SENDER), handle)
        for rank in range(SENDER + 1, self._size):
            self._awaited(rank)
        for rank in range(self._size):
            self._store.delete_key(self._key(self._number, rank))

    def _copy(self, bucket: Tensor) -> None:
        shared: Tensor = pickle.loads(base64.b64decode(self._awaited(SENDER)))
        bucket.copy_(shared)
        self._finish()  # before `shared` is closed
        self._store.set(self._key(self._number, self._rank), TAKEN)

    def _awaited(self, rank: int) -> str:
        told = self._store.get(self._key(self._number, rank)).decode()
        if told == LEFT:
            raise RuntimeError(f"member {rank} of the group has left it")
        return told

    def _finish(self) -> None:
        """What was started on the device has ended: other processes do not share its streams."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"shared/{number}/{rank}"
