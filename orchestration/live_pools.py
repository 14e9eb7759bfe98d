"""The running job's side of `covey scale`: hears requests, resizes pools, publishes how they stand.

Refuses to know how a pool grows (pool.py), how the learner restarts, and the files (scaling.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from orchestration.placement import Room, lack_of_room
from orchestration.places import PoolSizes
from orchestration.pool import ActorPool
from orchestration.recipe import Recipe
from orchestration.run_directory import write_json
from orchestration.scaling import (
    LEARNER,
    LOCAL,
    POOLS_FILE,
    PoolsRecord,
    Sizes,
    at_sizes,
    in_words,
    read_pools,
    read_request,
    size_problem,
    sizes_of,
)

EVERY_S = 1.0


class LearnerRanks(Protocol):
    """A learner that may be restarted with other ranks."""

    num_ranks: int  # that work, or worked before a restart
    is_restarting: bool
    ranks_setback: str | None  # why they are not those that were asked for last

    def request_ranks(self, ranks: int) -> None:
        """Restart it later, at a checkpoint."""
        ...


@asynccontextmanager
async def pools_kept(
    run: Path,
    recipe: Recipe,
    pools: Mapping[str, ActorPool[Any]],
    learner: LearnerRanks,
    *,
    room: Callable[[], Room] | None,
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """Requests are heard, and pools.json is kept up to date, while the block runs.

    `pools`: by role, without the learner; without `room` all requests are refused.
    """
    keeper = _Keeper(run, recipe, pools, learner, room, say)

    async def keep() -> None:
        """Waits for the clock alone; ended by the end of the block."""
        while True:
            with suppress(OSError):  # a full disk ends the run elsewhere, with its cause
                keeper.look()
            await asyncio.sleep(EVERY_S)

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keep(), name=POOLS_FILE)
        try:
            yield
        finally:
            keeping.cancel()


class _Keeper:
    """Hears requests and tells how the pools stand, once at a time."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        pools: Mapping[str, ActorPool[Any]],
        learner: LearnerRanks,
        room: Callable[[], Room] | None,
        say: Callable[[str], None],
    ) -> None:
        self._run = run
        self._recipe = recipe
        self._pools = pools
        self._learner = learner
        self._room = room
        self._say = say
        before, sizes = read_pools(run), sizes_of(recipe)
        asked = {} if before is None else before.asked
        self._asked = {role: size for role, size in asked.items() if sizes.get(role) == size}
        self._heard = None if before is None else before.request
        self._refusal: str | None = None
        self._told: PoolsRecord | None = None

    def look(self) -> None:
        """Do what was asked for since the last look, and write down what has changed."""
        request = read_request(self._run)
        if request is not None and request.id != self._heard:
            self._refusal = self._refused(request.sizes)
            self._heard = request.id
            if self._refusal is None:
                self._apply(request.sizes)
            else:
                self._say(f"covey scale: {self._refusal}")
        record = self._record()
        if record != self._told:
            write_json(self._run / POOLS_FILE, asdict(record))
            self._told = record

    def _refused(self, sizes: Sizes) -> str | None:
        """Nothing changes if any of it cannot be."""
        if self._room is None:
            return LOCAL
        if unknown := [role for role in sizes if role not in sizes_of(self._recipe)]:
            return f"this run has no role {unknown[0]!r}"
        if problem := size_problem(self._recipe, sizes):
            return problem
        now = at_sizes(self._recipe, {role: found.wanted for role, found in self._sizes().items()})
        lack = lack_of_room(now, at_sizes(now, sizes), self._room())
        return None if lack is None else f"{in_words(sizes)} does not fit: {lack}"

    def _apply(self, sizes: Sizes) -> None:
        before = self._sizes()
        changes = {r: n for r, n in sizes.items() if n != before[r].wanted}
        self._asked |= sizes
        for role, size in changes.items():
            if role == LEARNER:
                self._learner.request_ranks(size)
            else:
                self._pools[role].resize(size)
        moves = [f"{role} from {before[role].wanted} to {n}" for role, n in changes.items()]
        self._say(f"covey scale: {', '.join(moves) or 'nothing changes'}")

    def _sizes(self) -> dict[str, PoolSizes]:
        now, setback = self._learner.num_ranks, self._learner.ranks_setback
        wanted = now if setback is not None else self._asked.get(LEARNER, now)
        ready = 0 if self._learner.is_restarting else now
        learner = PoolSizes(
            wanted=wanted,
            ready=ready,
            starting=max(0, wanted - ready),
            leaving=max(0, ready - wanted),
        )
        return {**{role: pool.sizes for role, pool in self._pools.items()}, LEARNER: learner}

    def _record(self) -> PoolsRecord:
        sizes = self._sizes()
        setbacks = [pool.setback for pool in self._pools.values()] + [self._learner.ranks_setback]
        return PoolsRecord(
            can_scale=self._room is not None,
            request=self._heard,
            refusal=self._refusal or "; ".join(filter(None, setbacks)) or None,
            # A role that could not become what was asked is not asked for it again.
            asked={role: sizes[role].wanted for role in self._asked},
            pools=sizes,
        )
