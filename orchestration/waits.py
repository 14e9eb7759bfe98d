"""Named waits with owners and deadlines, and the register of who waits for whom right now.

A wait's name is `OWNER: WHAT WAS ASKED`: "rollout worker 1: sampling 8 rollouts of group 12". A
wait that begins while another one awaits it is a part of that one, and shares its deadline if it
has none of its own. Refuses to know what is waited for, and how a stall is worded
(stall_report.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from grpo.errors import DeadlineExceeded
from orchestration.stall_report import stall_report
from orchestration.waiting import Wait, Whereabouts, behind_nobody

T = TypeVar("T")


class Waits:
    """Every wait of the driver passes here, so that a stall can say who waits for whom."""

    def __init__(self, on_trouble: Callable[[str], None] = lambda text: None) -> None:
        """`on_trouble` hears of every worker that was given up, or cannot be started."""
        self.whereabouts: dict[str, Whereabouts] = {}  # by owner; absent: in this process
        self._on_trouble = on_trouble
        self._open: dict[int, Wait] = {}
        self._next = 0

    async def within(
        self,
        seconds: float,
        name: str,
        awaitable: Awaitable[T],
        *,
        behind: Callable[[], Iterable[str]] = behind_nobody,
    ) -> T:
        """The result, or DeadlineExceeded that names the culprit and everything else that is open.

        `behind`: owners of other waits that must end before this one can.
        """
        loop = asyncio.get_running_loop()
        report = ""
        limit = asyncio.timeout(None)

        def expire() -> None:
            """Look around while the waits inside this one are still open, then end them."""
            nonlocal report
            report = stall_report(wait.key, self.open, self.whereabouts, time.monotonic())
            limit.reschedule(loop.time())

        with self._opened(name, deadline_s=seconds, behind=behind) as wait:
            alarm = loop.call_later(seconds, expire)
            try:
                async with limit:
                    return await awaitable
            except TimeoutError as error:  # without a report it came out of the awaitable
                raise DeadlineExceeded(report or f"{name}: {error or 'timed out'}") from error
            finally:
                alarm.cancel()

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """A wait that ends with those inside it, which have deadlines."""
        with self._opened(name):
            yield

    @property
    def open(self) -> list[Wait]:
        """All waits, oldest first."""
        return list(self._open.values())

    def replacing(self, owner: str, cause: BaseException) -> None:
        """A worker is given up: say so, with the last lines of its log, and forget where it was."""
        whereabouts = self.whereabouts.pop(owner, None)
        tail = whereabouts.tail() if whereabouts is not None else ()
        lines = [f"{owner} is replaced: {_first_line(cause)}", *tail]
        self.trouble("\n".join(lines))

    def trouble(self, text: str) -> None:
        """Something that people should see, though the run goes on."""
        self._on_trouble(text)

    @contextmanager
    def _opened(
        self,
        name: str,
        *,
        deadline_s: float | None = None,
        behind: Callable[[], Iterable[str]] = behind_nobody,
    ) -> Iterator[Wait]:
        key, self._next = self._next, self._next + 1
        outer = _current.get()
        owner, _, asked = name.partition(": ")
        now = time.monotonic()
        wait = self._open[key] = Wait(
            key=key,
            owner=owner,
            asked=asked or (outer.wait.asked if outer is not None else ""),
            since=now,
            deadline=None if deadline_s is None else now + deadline_s,
            part_of=outer.wait.key if outer is not None and outer.waits is self else None,
            behind=behind,
        )
        token = _current.set(_Current(waits=self, wait=wait))
        try:
            yield wait
        finally:
            _current.reset(token)
            del self._open[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Current:
    """The wait that the running task is inside of."""

    waits: Waits
    wait: Wait


_current: ContextVar[_Current | None] = ContextVar("_current", default=None)


async def waiting_for(name: str, awaitable: Awaitable[T]) -> T:
    """A part of the wait that this task is inside of, where there is one: whom it is about.

    A name without `: WHAT` was asked what the whole was.
    """
    current = _current.get()
    if current is None:
        return await awaitable
    with current.waits.noted(name):
        return await awaitable


def note_whereabouts(found: Whereabouts, owner: str | None = None) -> None:
    """The owner of the wait that this task is inside of (or the given one) runs there."""
    current = _current.get()
    if current is not None:
        current.waits.whereabouts[owner or current.wait.owner] = found


def note_trouble(text: str) -> None:
    """The same for something that people should see, though the run goes on."""
    current = _current.get()
    if current is not None:
        current.waits.trouble(text)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
