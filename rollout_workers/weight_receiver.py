"""A rollout worker's end of a weight stream: buckets as they come, each checked before it is used.

Runs in every process of an engine. Refuses to know vLLM, and who sends.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import TCPStore

from grpo.errors import WeightMismatch
from grpo.weight_group import Membership, WeightGroup, joined, joined_store
from grpo.weight_stream import Told, WeightStream, bucket_key, bucket_sum


class WeightReceiver:
    """One process of a group, which is joined again only after a failure."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: WeightGroup | None = None
        self._store: TCPStore | None = None
        self._member: Membership | None = None

    def buckets(self, stream: WeightStream, *, process: int) -> Iterator[dict[str, Tensor]]:
        """The weights of a version, a bucket at a time, in memory that is theirs.

        WeightMismatch, if a bucket is not what was sent; RuntimeError, if a member is missing.
        """
        self._join(stream, process)
        assert self._store is not None and self._member is not None, "joined"
        mismatch: WeightMismatch | None = None
        for number in itertools.count():
            told = Told.read(self._store.get(bucket_key(stream.version, number)))
            if told.failure is not None:
                raise RuntimeError(f"the learner gave up: {told.failure}")
            if not told.entries:
                break
            bucket = torch.empty(told.num_bytes, dtype=torch.uint8, device=self._device)
            self._member.broadcast(bucket)
            mismatch = mismatch or _mismatch(bucket, told, stream.version)
            if mismatch is None:  # else the rest is taken for the sake of the other members
                yield {entry.name: entry.view(bucket) for entry in told.entries}
        if mismatch is not None:
            raise mismatch

    def leave(self) -> None:
        """Whoever waits for this process need not wait any longer."""
        if self._member is not None:
            self._member.abort()
        self._group = self._store = self._member = None

    def _join(self, stream: WeightStream, process: int) -> None:
        if stream.group == self._group:
            return
        self.leave()
        self._store = joined_store(stream.group)
        rank = stream.first_rank + process
        self._member = joined(
            self._store, stream.group, rank=rank, device=self._device, environment=os.environ
        )
        self._group = stream.group


def _mismatch(bucket: Tensor, told: Told, version: int) -> WeightMismatch | None:
    found = bucket_sum(bucket)
    if found == told.checksum:
        return None
    return WeightMismatch(
        f"weights of version {version} from {told.entries[0].name} to {told.entries[-1].name} "
        f"arrived with sum {found:016x}, but were sent with {told.checksum:016x}; "
        "they were not used"
    )
