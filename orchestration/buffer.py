"""The one place with shared mutable state: which groups live, which are ready,
which slots are free.

It is the queue, the back-pressure and the staleness control in one. A group holds its slot from
admission until the engines have loaded weights trained on it; a dropped group frees it at once.
With P groups a step, staleness bound S and window W a group can be overtaken by W - 1 younger ones,
so its age when it is trained on is at most (slots + W - 2) // P. `num_slots` are as many as keep
that at S. Refuses to know what a group contains.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def num_slots(groups_per_step: int, *, max_staleness: int, window: int) -> int:
    """(S + 1) * P - (W - 1) groups may be under way, and at least the P of a step.

    P = 64, S = 1: 128 with W = 1, 97 with W = 32.
    """
    spare = max_staleness * groups_per_step
    return groups_per_step + spare - min(window - 1, spare)


class Closed(Exception):
    """The buffer was closed while somebody waited at it; nothing more is admitted or handed out."""


class GroupBuffer(Generic[T]):
    """Admission slots and finished groups, in admission order."""

    def __init__(
        self,
        *,
        slots: int,
        window: int,
        limit: int,
        next_group: int = 0,
        pending: Iterable[int] = (),
    ) -> None:
        """`limit`: groups to hand out in all. `pending`: ids of an earlier run to admit first."""
        self._free = slots
        self._window = window
        self._limit = limit
        self._pending = list(pending)
        self._next_id = next_group
        self._live: dict[int, T | None] = {}  # admitted, not taken; None: not finished yet
        self._overtaken: dict[int, int] = {}  # live group -> younger groups taken before it
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
            group = self._pending.pop(0) if self._pending else self._new_id()
            self._live[group] = None
            self._overtaken[group] = 0
            return group

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

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
            del self._live[group], self._overtaken[group]
            self._free += 1
            self._changed.notify_all()

    async def take(self, count: int) -> list[T]:
        """Wait for `count` finished groups, in admission order within the window."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or len(self._takeable(count)) == count
            )
            if self._closed:
                raise Closed
            chosen = self._takeable(count)
            self._taken += count
            ascending = sorted(chosen)
            for group in self._live:
                self._overtaken[group] += count - bisect_right(ascending, group)
            taken = [value for group in chosen if (value := self._live.pop(group)) is not None]
            self._overtaken = {group: self._overtaken[group] for group in self._live}
            return taken

    def _takeable(self, count: int) -> list[int]:
        """The first `count` finished groups that no waiting older group forbids to pass.

        A group may be overtaken by window - 1 younger ones in its life. Without that bound a
        straggler could be passed for ever, and would be stale beyond the promise when it ends.
        """
        chosen: list[int] = []
        may_pass = 0
        waiting = False  # an unfinished older group has been seen
        for group, value in self._live.items():
            if len(chosen) == count or (waiting and may_pass == 0):
                break
            if value is None:
                left = self._window - 1 - self._overtaken[group]
                may_pass = min(may_pass, left) if waiting else left
                waiting = True
            else:
                chosen.append(group)
                may_pass -= waiting
        return chosen

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
