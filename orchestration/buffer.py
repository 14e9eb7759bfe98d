"""The one place with shared mutable state: which groups live, which are ready, which slots are free.

It is the queue, the back-pressure and the staleness control in one. A group holds its slot from
admission until the engines have loaded weights trained on it; a dropped group frees it at once.
With P groups a step, staleness bound S and window W there are (S + 1) * P slots, and the age of a
group when it is trained on is at most (slots + W - 2) // P: S for W = 1. Refuses to know what a
group contains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The buffer was closed while somebody waited at it; nothing more is admitted or handed out."""


class GroupBuffer(Generic[T]):
    """Admission slots and finished groups, in admission order."""

    def __init__(self, *, slots: int, window: int, limit: int, pending: Iterable[int] = ()) -> None:
        """`limit`: groups to hand out in all. `pending`: ids of an earlier run to admit first."""
        self._free = slots
        self._window = window
        self._limit = limit
        self._pending = list(pending)
        self._next_id = max(self._pending, default=-1) + 1
        self._live: dict[int, T | None] = {}  # admitted, not taken; None: not finished yet
        self._taken = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """Wait for a free slot and take it; returns the id of the new group."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._may_admit())
            if self._closed:
                raise Closed
            self._free -= 1
            group = self._pending.pop(0) if self._pending else self._next_id
            self._next_id = max(self._next_id, group + 1)
            self._live[group] = None
            return group

    def _may_admit(self) -> bool:
        return self._free > 0 and self._taken + len(self._live) < self._limit

    async def finish(self, group: int, value: T) -> None:
        """The group is complete and waits to be taken."""
        async with self._changed:
            assert self._live[group] is None, f"group {group} finished twice"
            self._live[group] = value
            self._changed.notify_all()

    async def drop(self, group: int) -> None:
        """The group will not be trained on: its slot is free at once."""
        async with self._changed:
            del self._live[group]
            self._free += 1
            self._changed.notify_all()

    async def take(self, count: int) -> list[T]:
        """Wait for `count` finished groups, in admission order within the window."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or len(self._takeable(count)) >= count
            )
            if self._closed:
                raise Closed
            chosen = self._takeable(count)[:count]
            self._taken += count
            return [value for group in chosen if (value := self._live.pop(group)) is not None]

    def _takeable(self, count: int) -> list[int]:
        """Finished groups among the oldest `count + window - 1` that are alive."""
        oldest = list(self._live)[: count + self._window - 1]
        return [group for group in oldest if self._live[group] is not None]

    async def release(self, count: int) -> None:
        """The engines hold weights trained on `count` groups: as many new ones may be born."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()

    async def close(self) -> None:
        """Wake everybody who waits here with `Closed`."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def next_group(self) -> int:
        """The id that the next new group gets; every smaller id was admitted or is pending."""
        return self._next_id

    @property
    def unfinished(self) -> list[int]:
        """Ids admitted and not taken yet, oldest first, then those still to be admitted again."""
        return [*self._live, *self._pending]

    @property
    def in_progress(self) -> list[int]:
        """Ids that are still being sampled or scored."""
        return [group for group, value in self._live.items() if value is None]
