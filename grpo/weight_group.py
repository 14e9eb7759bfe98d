"""A group of processes that hand each other flat buffers: a sender, and those that receive.

It meets once, at a store that the sender opens, and stays together until one is missing. Refuses to
know what the buffers hold.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch marks no re-export
from torch.multiprocessing import set_sharing_strategy  # registers how tensors are handed over

SENDER = 0  # rank in the group
# A member that waits longer, for the others to come or for the next bucket, has lost one.
PATIENCE = timedelta(seconds=60)
LEFT, TAKEN = "left", "taken"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Where processes meet once; they stay together until one of them is missing."""

    host: str
    port: int
    size: int  # the sender and all processes of its rollout workers
    is_local: bool = False  # all can open the sender's memory: one GPU, or the CPUs of one node


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


def joined(
    store: TCPStore,
    group: WeightGroup,
    *,
    rank: int,
    device: torch.device,
    environment: MutableMapping[str, str],
) -> Membership:
    """This process's own place in a group; `environment` is that of the process."""
    if group.is_local:
        return SharedMembership(store, group.size, rank=rank, device=device)
    with _errors_of_nccl_are_raised(environment):
        return NetworkMembership(store, group, rank=rank, device=device)


@contextmanager
def _errors_of_nccl_are_raised(environment: MutableMapping[str, str]) -> Iterator[None]:
    """By a wait of a group that is made in this block; else a lost peer ends this process, too."""
    name = "TORCH_NCCL_BLOCKING_WAIT"  # read when a group is made, and meant for all of a process
    before = environment.get(name)
    environment[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del environment[name]
        else:
            environment[name] = before


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
            options._timeout = 2 * PATIENCE  # of torch's own watch: wait() below is first
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
