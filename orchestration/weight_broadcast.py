"""Weights straight into the rollout workers, while the learner gathers them: who takes part.

A worker that has loaded a version before takes part in the next ones; whoever does not get it this
way, a new worker among them, loads it from the object store as ever. Refuses to know how weights
are sent, and Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from grpo.errors import StreamBroken, Transient
from grpo.weight_stream import SENDER, WeightGroup, WeightStream
from orchestration.waits import note_trouble


class Receiver(Protocol):
    """A rollout worker that may be sent weights."""

    has_loaded: bool  # some version, by either way

    async def receive_weights(self, stream: WeightStream) -> None:
        """Swap the weights while they are sent; Transient: it holds none until it loads some."""
        ...

    def forget_received(self) -> None:
        """Load whatever comes next, even if a version of that number was received."""
        ...


class WeightBroadcast:
    """The learner's rank 0 and the processes of all workers, as one group while all are there."""

    def __init__(
        self,
        workers: Callable[[], Sequence[Receiver]],
        *,
        processes_per_worker: int,
        deadline_s: float,
    ) -> None:
        """`workers`: all that are alive, as far as is known; each has so long for a version."""
        self._workers = workers
        self._processes_per_worker = processes_per_worker
        self._deadline_s = deadline_s
        self._members: list[Receiver] = []
        self._group: WeightGroup | None = None  # None: the members have to meet

    def forget(self) -> None:
        """The learner is another one, or a member is missing."""
        self._group = None

    async def group(self, meet: Callable[[], Awaitable[tuple[str, int]]]) -> WeightGroup | None:
        """Those that take part in the next version; None: nobody. `meet`: host, port of rank 0."""
        for worker in self._workers():
            worker.forget_received()
        members = [worker for worker in self._workers() if worker.has_loaded]
        if not members:
            return None
        if self._group is None or members != self._members:
            host, port = await meet()
            size = 1 + len(members) * self._processes_per_worker
            self._group, self._members = WeightGroup(host=host, port=port, size=size), members
        return self._group

    async def received(self, group: WeightGroup, version: int) -> None:
        """When every member has the version, or has failed to get it."""
        first = SENDER + 1
        streams = [
            WeightStream(group=group, first_rank=rank, version=version)
            for rank in range(first, group.size, self._processes_per_worker)
        ]
        failures = await asyncio.gather(
            *[self._failure(*pair) for pair in zip(self._members, streams, strict=True)]
        )
        causes = [failure for failure in failures if failure is not None]
        if causes:
            self.forget()
            note_trouble(
                f"version {version} did not reach {len(causes)} of {len(failures)} rollout workers "
                f"by broadcast, and they load it from the object store: {causes[0]}"
            )

    async def _failure(self, worker: Receiver, stream: WeightStream) -> Transient | None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await worker.receive_weights(stream)
        except TimeoutError:
            return StreamBroken(f"a worker has not answered for {self._deadline_s:g} s")
        except Transient as error:
            return error
        return None
