"""Pools of interchangeable workers: least loaded first, retried elsewhere, healed, resized.

A call waits for no replacement while another worker serves: workers are started and ended in the
background, and a new one serves once it has done what all of them had to (load the weights).
Refuses to know whether a worker is an actor or an object in this process; `spawn` and `discard` do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Generic, TypeVar

from grpo.errors import CoveyError, DeadlineExceeded, Fatal, Transient
from orchestration.places import Place, PoolSizes, Spawner, Standing
from orchestration.waits import Waits

W = TypeVar("W")
T = TypeVar("T")
FIRST_PAUSE_S = 1.0  # before the next try of a worker that could not be started; then doubled
LONGEST_PAUSE_S = 60.0


class Exhausted(Fatal):
    """The retry budget of one call is used up."""


class ActorPool(Generic[W]):
    """Runs calls on the least loaded worker that serves, and keeps as many as are wanted."""

    def __init__(
        self,
        role: str,
        spawner: Spawner[W],
        *,
        tasks: asyncio.TaskGroup,
        retries: int,
        deadline_s: float,
        start_deadline_s: float,
        waits: Waits,
    ) -> None:
        """`tasks` gets what goes on in the background; close() ends it."""
        self.role = role
        self.num_replaced = 0  # workers that were lost
        self.setback: str | None = None  # why the pool is smaller than the last wish
        self._spawner = spawner
        self._tasks = tasks
        self._retries = retries
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._waits = waits
        self._wanted = 0
        self._places: list[Place[W]] = []
        self._standing: Standing[W] | None = None
        self._some_serve = asyncio.Event()
        self._empty_since = 0.0  # of the event loop; meaningless while some serve
        self._end_of_run: CoveyError | None = None  # for whoever calls next

    async def start(self, size: int) -> None:
        """Bring up `size` workers at once."""
        self._wanted = size
        self._places = [self._place(index) for index in range(size)]
        async with asyncio.TaskGroup() as starting:
            for place in self._places:
                starting.create_task(self._bring_up(place))

    async def close(self) -> None:
        """End every worker, and what goes on in the background."""
        changing = [place.task for place in self._places if place.task is not None]
        for task in changing:
            task.cancel()
        if changing:
            await asyncio.wait(changing)
        await asyncio.gather(*[self._end(place) for place in self._places])
        self._places = []

    @property
    def workers(self) -> list[W]:
        """Those that serve."""
        return [place.worker for place in self._places if place.serves and place.worker is not None]

    @property
    def sizes(self) -> PoolSizes:
        """As of now."""
        staying = self._staying
        ready = sum(place.serves for place in staying)
        return PoolSizes(
            wanted=self._wanted,
            ready=ready,
            starting=len(staying) - ready,
            leaving=len(self._places) - len(staying),
        )

    async def run(self, what: str, call: Callable[[W], Awaitable[T]]) -> T:
        """The call's result from some worker; Transient failures are retried within the budget."""
        failure: Transient | None = None
        for _ in range(self._retries + 1):
            await self._until_some_serve()
            serving = [place for place in self._staying if place.serves]
            place = min(serving, key=lambda place: (len(place.calls), place.index))
            try:
                return await self._on(place, what, call)
            except Transient as error:
                failure = error
        assert failure is not None
        raise Exhausted(
            f"{self.role}: {what} failed {self._retries + 1} times, last: {failure}"
        ) from failure

    async def broadcast(self, what: str, call: Callable[[W], Awaitable[T]]) -> list[T]:
        """The results of all that serve, at least one; others do it before they serve."""
        results: list[T] = []

        async def answered(worker: W) -> None:
            results.append(await call(worker))

        async def on(place: Place[W]) -> None:
            try:
                await self._on(place, what, answered)
            except Transient:
                return  # given up: the next one in its place does it before it serves

        self._standing = Standing(what, answered)
        await asyncio.gather(*[on(place) for place in self._places if place.serves])
        if not results:
            await self._until_some_serve()
        return results

    def replace(self, worker: W, cause: Transient) -> None:
        """Start a fresh one in the place of this worker, if it still serves."""
        for place in self._places:
            if place.worker is worker and place.serves:
                self._give_up(place, cause)

    def resize(self, size: int) -> None:
        """Start or dismiss workers in the background; the last wish counts."""
        assert size >= 1, "a pool without workers answers nobody"
        self._wanted, self.setback = size, None
        # Whoever does not serve yet leaves first, then the newest.
        staying = sorted(self._staying, key=lambda place: (not place.serves, place.index))
        for place in staying[size:]:
            place.is_leaving = True
            self._change(place, self._retire)
        missing = max(0, size - len(staying))
        leaving = [place for place in self._places if place.is_leaving and place.serves]
        for place in leaving[:missing] if missing else ():
            place.is_leaving = False
            self._change(place, None)
        for _ in range(missing - len(leaving)):
            used = {place.index for place in self._places}
            place = self._place(next(i for i in range(len(used) + 1) if i not in used))
            self._places.append(place)
            self._change(place, self._fill)
        self._look_who_serves()

    @property
    def _staying(self) -> list[Place[W]]:
        return [place for place in self._places if not place.is_leaving]

    def _place(self, index: int) -> Place[W]:
        return Place(index, f"{self.role} {index}")

    async def _on(self, place: Place[W], what: str, call: Callable[[W], Awaitable[T]]) -> T:
        """The call's result; a worker that fails is given up."""
        worker = place.worker
        assert worker is not None, "it serves"
        try:
            async with place.counted():
                name = f"{place.name}: {what}"
                return await self._waits.within(self._deadline_s, name, call(worker))
        except Transient as error:
            self.replace(worker, error)  # unless somebody already did
            raise

    def _give_up(self, place: Place[W], cause: Transient) -> None:
        place.serves = False
        place.cut()
        self._look_who_serves()
        if place.is_leaving:
            self._waits.trouble(f"{place.name} was leaving and is ended: {_first_line(cause)}")
            return
        self.num_replaced += 1
        self._waits.replacing(place.name, cause)
        self._change(place, self._fill)

    async def _until_some_serve(self) -> None:
        """Fatal if nobody could be started for the whole deadline."""
        while self._end_of_run is None and not self._some_serve.is_set():
            now = asyncio.get_running_loop().time()
            try:
                await self._waits.within(
                    max(0.0, self._empty_since + self._start_deadline_s - now),
                    f"{self.role} pool: a worker that serves",
                    self._some_serve.wait(),
                    behind=lambda: [place.name for place in self._places],
                )
            except DeadlineExceeded as error:
                raise Fatal(
                    f"no {self.role} is left, and for {self._start_deadline_s:g} s none could be "
                    f"started: {error}"
                ) from error
        if self._end_of_run is not None:
            raise self._end_of_run

    def _look_who_serves(self) -> None:
        if any(place.serves for place in self._staying):
            self._some_serve.set()
        elif self._some_serve.is_set():
            self._some_serve.clear()
            self._empty_since = asyncio.get_running_loop().time()

    def _change(
        self, place: Place[W], work: Callable[[Place[W]], Coroutine[None, None, None]] | None
    ) -> None:
        """Do this with the place instead of what is being done with it."""
        before, place.task = place.task, None
        if before is not None:
            before.cancel()
        if work is None:
            return

        async def changed() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work(place)

        # A context of its own: no part of the wait of whoever found that this has to be done.
        place.task = self._tasks.create_task(changed(), name=place.name, context=Context())

    async def _fill(self, place: Place[W]) -> None:
        """Ends the place's worker and starts another; waits for room as long as it takes."""
        pause_s, is_told = FIRST_PAUSE_S, False
        while True:
            await self._end(place)
            try:
                await self._bring_up(place)
            except Transient as error:
                cause = _first_line(error)
            except CoveyError as error:
                await self._leave_empty(place, error)
                return
            else:
                break
            if not is_told:
                self._waits.trouble(f"{place.name} cannot be started and is tried again: {cause}")
                is_told = True
            name = f"{place.name}: could not be started, is tried again after {pause_s:g} s"
            await self._waits.within(
                self._start_deadline_s + pause_s, f"{name} ({cause})", asyncio.sleep(pause_s)
            )
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if is_told:
            self._waits.trouble(f"{place.name} has been started after all")

    async def _bring_up(self, place: Place[W]) -> None:
        worker = place.worker = await self._waits.within(
            self._start_deadline_s, f"{place.name}: starting", self._spawner.spawn(place.index)
        )
        done = None
        while (standing := self._standing) is not done and standing is not None:
            name = f"{place.name}: {standing.what}"
            await self._waits.within(self._deadline_s, name, standing.call(worker))
            done = standing  # by now there may be a newer one
        place.serves = place.has_served = True
        self._look_who_serves()

    async def _leave_empty(self, place: Place[W], error: CoveyError) -> None:
        """Trying again would not help: the pool stays as it was, or the run ends."""
        if place.has_served:
            self._end_of_run = error
            self._some_serve.set()
            return
        self._wanted -= 1
        self.setback = f"{place.name} could not be started: {error}"
        self._waits.trouble(f"{self.setback}\n{self.role}: the pool goes on with {self._wanted}")
        place.is_leaving = True
        await self._retire(place)

    async def _retire(self, place: Place[W]) -> None:
        """Waits for the calls that the worker has, which have deadlines, and ends it."""
        while place.serves and place.calls:
            with self._waits.noted(f"{place.name}: finishing its calls before it leaves"):
                await place.idle.wait()
        place.serves = False
        await self._end(place)
        self._waits.whereabouts.pop(place.name, None)
        self._places.remove(place)

    async def _end(self, place: Place[W]) -> None:
        """A worker that cannot be ended in time is left to itself."""
        if place.worker is None:
            return
        name = f"{place.name}: being ended"
        try:
            await self._waits.within(self._deadline_s, name, self._spawner.discard(place.worker))
        except Transient as error:
            self._waits.trouble(f"{place.name} could not be ended: {error}")
        place.worker, place.serves = None, False


def _first_line(error: Transient) -> str:
    return str(error).partition("\n")[0]
