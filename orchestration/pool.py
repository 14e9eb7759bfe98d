"""Pools of interchangeable workers: least loaded first, retried elsewhere, healed in place.

A worker that is lost or too slow is replaced by a fresh one, which catches up (loads the current
weights) before it serves. Refuses to know whether a worker is an actor or an object in this
process; `spawn` and `discard` do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from grpo.engines import RolloutEngine
from grpo.errors import Fatal, Transient
from grpo.types import LoadReport, Rollout, SampleRequest, WeightRef
from orchestration.waits import Waits

W = TypeVar("W")
T = TypeVar("T")


class Spawner(Protocol[W]):
    """Makes and removes the workers of one pool."""

    async def spawn(self, place: int) -> W:
        """A started worker for this place of the pool."""
        ...

    async def discard(self, worker: W) -> None:
        """End a worker, whatever state it is in."""
        ...


@dataclass(slots=True, eq=False)
class _Place(Generic[W]):
    """One place of a pool; the worker in it may change."""

    index: int
    worker: W
    load: int = 0
    healthy: bool = True
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class ActorPool(Generic[W]):
    """Runs calls on the least loaded healthy worker and replaces workers that fail."""

    def __init__(
        self,
        role: str,
        spawner: Spawner[W],
        *,
        retries: int,
        deadline_s: float,
        start_deadline_s: float,
        waits: Waits,
        catch_up: Callable[[W], Awaitable[object]] | None = None,
    ) -> None:
        self.role = role
        self.num_replaced = 0
        self._spawner = spawner
        self._retries = retries
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._waits = waits
        self._catch_up = catch_up
        self._places: list[_Place[W]] = []

    async def start(self, size: int) -> None:
        """Bring up `size` workers at once."""
        workers = await asyncio.gather(*[self._spawn(index) for index in range(size)])
        self._places = [_Place(index, worker) for index, worker in enumerate(workers)]

    async def close(self) -> None:
        """End every worker."""
        await asyncio.gather(*[self._spawner.discard(place.worker) for place in self._places])
        self._places = []

    @property
    def workers(self) -> list[W]:
        """Those that are not being replaced."""
        return [place.worker for place in self._places if place.healthy]

    async def run(self, what: str, call: Callable[[W], Awaitable[T]]) -> T:
        """The call's result from some worker; Transient failures are retried within the budget."""
        failure: Transient | None = None
        for _ in range(self._retries + 1):
            place = await self._least_loaded()
            worker = place.worker
            place.load += 1
            name = f"{self.role} {place.index}: {what}"
            try:
                return await self._waits.within(self._deadline_s, name, call(worker))
            except Transient as error:
                failure = error
                await self._heal(place, worker, error)
            finally:
                place.load -= 1
        assert failure is not None
        raise Exhausted(
            f"{self.role}: {what} failed {self._retries + 1} times, last: {failure}"
        ) from failure

    async def each(self, what: str, call: Callable[[W], Awaitable[T]]) -> list[T]:
        """The call's result from every worker; a worker that fails is replaced and asked again."""
        return list(await asyncio.gather(*[self._on(place, what, call) for place in self._places]))

    async def _on(self, place: _Place[W], what: str, call: Callable[[W], Awaitable[T]]) -> T:
        name = f"{self.role} {place.index}: {what}"
        for _ in range(self._retries + 1):
            async with place.changing:
                worker = place.worker
                try:
                    return await self._waits.within(self._deadline_s, name, call(worker))
                except Transient as error:
                    failure = error
            await self._heal(place, worker, failure)
        raise Exhausted(f"{name} failed {self._retries + 1} times, last: {failure}") from failure

    async def _least_loaded(self) -> _Place[W]:
        healthy = [place for place in self._places if place.healthy]
        if not healthy:  # wait until one is healed
            first = self._places[0]
            with self._waits.noted(f"{self.role} {first.index}: being replaced"):
                async with first.changing:
                    healthy = [first]
        return min(healthy, key=lambda place: (place.load, place.index))

    async def _heal(self, place: _Place[W], lost: W, cause: Transient) -> None:
        """Replace the lost worker, unless somebody already did."""
        place.healthy = False
        async with place.changing:
            if place.worker is lost:
                name = f"{self.role} {place.index}"
                self._waits.replacing(name, cause)
                await self._waits.within(
                    self._deadline_s, f"{name}: being ended", self._spawner.discard(lost)
                )
                place.worker = await self._spawn(place.index)
                self.num_replaced += 1
            place.healthy = True

    async def _spawn(self, index: int) -> W:
        name = f"{self.role} {index}: starting"
        worker = await self._waits.within(self._start_deadline_s, name, self._spawner.spawn(index))
        if self._catch_up is not None:
            await self._waits.within(self._deadline_s, name, self._catch_up(worker))
        return worker


class Exhausted(Fatal):
    """The retry budget of one call is used up."""


class RolloutPool:
    """A RolloutEngine over several; all of them hold the version that was loaded last."""

    def __init__(
        self,
        spawner: Spawner[RolloutEngine],
        *,
        retries: int,
        deadline_s: float,
        start_deadline_s: float,
        waits: Waits,
    ) -> None:
        self._ref: WeightRef | None = None  # None: the model as it is on disk
        self.pool = ActorPool(
            "rollout worker",
            spawner,
            retries=retries,
            deadline_s=deadline_s,
            start_deadline_s=start_deadline_s,
            waits=waits,
            catch_up=self._load_current,
        )

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """All rollouts of one call come from one worker, which can share their context."""
        what = f"sampling {len(requests)} rollouts of group {requests[0].group}"
        return await self.pool.run(what, lambda worker: worker.sample(requests))

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        """Load in all workers; the report is of the slowest."""
        self._ref = ref
        what = f"loading version {ref.version}"
        reports = await self.pool.each(what, lambda worker: worker.load_weights(ref))
        for report in reports:
            if (report.version, report.checksum) != (ref.version, ref.checksum):
                return report  # the caller compares and stops
        return max(reports, key=lambda report: sum(report.timings_s.values()))

    async def _load_current(self, worker: RolloutEngine) -> None:
        if self._ref is not None:
            await worker.load_weights(self._ref)
