"""A sender and receivers of one group, each in a thread of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from grpo.weight_group import WeightGroup
from grpo.weight_stream import WeightStream
from learner.weight_sender import WeightSender
from rollout_workers.weight_receiver import WeightReceiver

CPU = torch.device("cpu")


def met(sender: WeightSender, *, receivers: int, is_local: bool = False) -> WeightGroup:
    """A new group of so many receiving processes."""
    host = "127.0.0.1"
    return WeightGroup(host=host, port=sender.open(host), size=1 + receivers, is_local=is_local)


def send(
    sender: WeightSender,
    group: WeightGroup,
    parts: Sequence[Mapping[str, Tensor]],
    *,
    version: int = 1,
    before: Callable[[], None] = lambda: None,
) -> None:
    """All parts as one version; `before` runs once the group is complete."""
    sender.begun(group, version)
    before()
    for part in parts:
        sender.add(part)
    sender.end()


def received(
    receiver: WeightReceiver, group: WeightGroup, *, rank: int = 1, version: int = 1
) -> list[dict[str, Tensor]]:
    """The buckets of a version."""
    stream = WeightStream(group=group, first_rank=rank, version=version)
    return list(receiver.buckets(stream, process=0))


def in_thread(work: Callable[[], object]) -> Future[object]:
    """Its result, while this thread does something else."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


class Spoiling:
    """A sender's membership that turns one byte of a bucket after its sum was told."""

    def __init__(self, member: object, *, bucket: int, byte: int) -> None:
        self._member = member
        self._left = bucket
        self._byte = byte

    def broadcast(self, bucket: Tensor) -> None:
        if self._left == 0:
            bucket[self._byte] ^= 1
        self._left -= 1
        self._member.broadcast(bucket)  # type: ignore[attr-defined]  # a Membership

    def abort(self) -> None:
        self._member.abort()  # type: ignore[attr-defined]  # as above
