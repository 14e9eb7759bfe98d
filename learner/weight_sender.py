"""The learner's end of a weight stream: packs weights into buckets and hands them over.

Gathering weights from the other ranks goes on whatever happens to the rollout workers: a failure
ends the stream, never the learner. Refuses to know the ranks and who decides on a stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed import TCPStore

from grpo.weight_group import SENDER, Membership, WeightGroup, joined, opened_store
from grpo.weight_stream import DTYPE_NAMES, Entry, Told, bucket_key, bucket_sum, room

BUCKET_BYTES = 2**28  # one weight at least; the memory that a stream takes at both ends


class WeightSender:
    """The first of a group of its own, which is left and opened anew after a failure."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the floating-point weights that the rollout workers get."""
        self._device = device
        self._dtype = dtype
        self._store: TCPStore | None = None
        self._member: Membership | None = None  # None: the others have still to come
        self._version = 0
        self._num_sent = 0  # buckets
        self._failure: str | None = None
        self._bucket: Tensor | None = None  # None: no memory is held
        self._entries: list[Entry] = []
        self._end = 0  # of the last entry, bytes

    def open(self, host: str) -> int:
        """The port of this node where a new group can meet."""
        self.leave()
        self._store = opened_store(host)
        return int(self._store.port)

    def begun(self, group: WeightGroup, version: int) -> WeightSender:
        """This one, once a new group is complete; nobody may need the last version any more."""
        for bucket in range(self._num_sent + 1):
            self._opened.delete_key(bucket_key(self._version, bucket))
        self._version, self._num_sent, self._failure = version, 0, None
        self._entries, self._end = [], 0
        self._try(partial(self._join, group))
        return self

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Weights by name, whole until this returns."""
        for name, weight in part.items():
            self._try(partial(self._pack, name, weight))

    def end(self) -> None:
        """Send what is left, and that it was all."""
        self._try(self._flush)
        self._try(lambda: self._tell(self._num_sent, Told()))
        self._bucket = None

    def leave(self) -> None:
        """Whoever waits for this process need not wait any longer."""
        if self._member is not None:
            self._member.abort()
            self._member = None

    @property
    def _opened(self) -> TCPStore:
        assert self._store is not None, "open() comes first"
        return self._store

    def _try(self, act: Callable[[], None]) -> None:
        """Torch has no narrower kind of error for a lost peer, nor for memory that is lacking."""
        if self._failure is not None:
            return
        try:
            act()
        except RuntimeError as error:
            self._failure = str(error).partition("\n")[0]
            for bucket in (self._num_sent, self._num_sent + 1):  # some wait for the next already
                self._tell(bucket, Told(failure=self._failure))
            self.leave()

    def _join(self, group: WeightGroup) -> None:
        if self._member is None:
            self._member = joined(
                self._opened, group, rank=SENDER, device=self._device, environment=os.environ
            )

    @torch.no_grad()
    def _pack(self, name: str, weight: Tensor) -> None:
        dtype = self._dtype if weight.is_floating_point() else weight.dtype
        size = room(weight, dtype)
        if self._entries and self._end + size > BUCKET_BYTES:
            self._flush()
        if self._bucket is None or len(self._bucket) < size:
            num_bytes = max(size, BUCKET_BYTES)
            self._bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        entry = Entry(
            name=name, dtype=DTYPE_NAMES[dtype], shape=tuple(weight.shape), start=self._end
        )
        entry.view(self._bucket).copy_(weight)
        self._entries.append(entry)
        self._end += size

    def _flush(self) -> None:
        if self._bucket is None or not self._entries:
            return
        assert self._member is not None, "begun() comes first"
        bucket = self._bucket[: self._end]
        told = Told(entries=self._entries, num_bytes=len(bucket), checksum=bucket_sum(bucket))
        self._tell(self._num_sent, told)
        self._member.broadcast(bucket)
        self._num_sent += 1
        self._entries, self._end = [], 0

    def _tell(self, bucket: int, told: Told) -> None:
        self._opened.set(bucket_key(self._version, bucket), told.text())
