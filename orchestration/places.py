"""What a pool is made of: places with a worker each, and how workers come and go.

Refuses to know which place gets a call and when a worker is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from grpo.errors import WorkerLost

W = TypeVar("W")


class Spawner(Protocol[W]):
    """Makes and removes the workers of one pool."""

    async def spawn(self, place: int) -> W:
        """A started worker for this place of the pool; nothing is left of it if that fails."""
        ...

    async def discard(self, worker: W) -> None:
        """End a worker, whatever state it is in."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """How many workers a pool shall have, and what its workers are doing."""

    wanted: int
    ready: int
    starting: int  # for the first time, or in the place of one that was lost
    leaving: int  # finish what they have, and get nothing new


@dataclass(slots=True, eq=False)
class Place(Generic[W]):
    """One place of a pool; the worker in it may change."""

    index: int
    name: str  # the owner of its waits
    worker: W | None = None  # None: it has none to end
    serves: bool = False
    has_served: bool = False
    is_leaving: bool = False
    calls: set[asyncio.Timeout] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None  # the one that starts or ends its worker

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """A call; it ends with WorkerLost when its worker is given up."""
        try:
            async with asyncio.timeout(None) as limit:
                self.calls.add(limit)
                self.idle.clear()
                try:
                    yield
                finally:
                    self.calls.discard(limit)
                    if not self.calls:
                        self.idle.set()
        except TimeoutError:
            raise WorkerLost(f"{self.name} was given up before it had answered") from None

    def cut(self) -> None:
        """End every call that is under way."""
        now = asyncio.get_running_loop().time()
        for limit in self.calls:
            limit.reschedule(now)
        self.calls.clear()
        self.idle.set()


@dataclass(frozen=True, slots=True, eq=False)
class Standing(Generic[W]):
    """What every worker has to have done before it serves."""

    what: str
    call: Callable[[W], Awaitable[None]]
