"""Requests that are made together join together, so that batches do not depend on timing.

Which rows are beside each other decides in which order an engine adds floating-point numbers, and
with it the last digit of a log-probability: at staleness 0 a resumed run would not be the
uninterrupted one. Knows nothing of what is asked for and who answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Turn(Generic[T]):
    """What is asked for in one turn of the event loop, handed over at its end and in its order."""

    def __init__(self, hand_over: Callable[[list[T]], None]) -> None:
        self._hand_over = hand_over
        self._arrived: list[T] = []

    async def join(self, items: Sequence[T]) -> None:
        """Returns when these have been handed over."""
        self._arrived += items
        await asyncio.sleep(0)  # to the end of the turn
        arrived, self._arrived = self._arrived, []
        if arrived:  # else the first of the turn has done it
            self._hand_over(arrived)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """A call's place among those that were made in one turn; they may arrive one by one."""

    turn: int
    place: int
    size: int


class Gate:
    """Holds calls until all of their turn are here, and lets them go in one turn, in order."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, asyncio.Future[None]]] = {}

    async def passed(self, together: Together) -> None:
        """Returns when the last of the turn has arrived; whoever makes the calls makes them all."""
        loop = asyncio.get_running_loop()
        held = self._held.setdefault(together.turn, {})
        held[together.place] = opened = loop.create_future()
        if len(held) == together.size:
            del self._held[together.turn]
            for place in sorted(held):
                # Not now: the last to arrive would run on, ahead of the others.
                loop.call_soon(_open, held[place])
        await opened


def _open(held: asyncio.Future[None]) -> None:
    if not held.done():  # nobody waits for a call that was cancelled
        held.set_result(None)
