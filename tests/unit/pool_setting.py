"""Pools with their background tasks, for the time of a block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from grpo.engines import RolloutEngine
from orchestration.places import Spawner
from orchestration.pool import ActorPool
from orchestration.rollout_pool import RolloutPool
from orchestration.waits import Waits

W = TypeVar("W")


@asynccontextmanager
async def started_pool(
    spawner: Spawner[W],
    size: int,
    *,
    role: str = "rollout worker",
    retries: int = 2,
    deadline_s: float = 5.0,
    start_deadline_s: float = 5.0,
    waits: Waits | None = None,
) -> AsyncIterator[ActorPool[W]]:
    """`size` workers that serve; they are gone when the block ends."""
    async with asyncio.TaskGroup() as tasks:
        pool = ActorPool(
            role,
            spawner,
            tasks=tasks,
            retries=retries,
            deadline_s=deadline_s,
            start_deadline_s=start_deadline_s,
            waits=waits or Waits(),
        )
        try:
            await pool.start(size)
            yield pool
        finally:
            await pool.close()


@asynccontextmanager
async def started_engines(
    spawner: Spawner[RolloutEngine], size: int, **settings: object
) -> AsyncIterator[RolloutPool]:
    """The same as one engine."""
    async with started_pool(spawner, size, **settings) as pool:  # type: ignore[arg-type]  # shorthand
        yield RolloutPool(pool)
