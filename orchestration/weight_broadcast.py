"""Weights straight into the rollout workers, while the learner gathers them: who takes part.

A worker that has loaded a version before takes part in the next ones; whoever does not get it this
way, a new worker among them, loads it from the object store as ever. Refuses to know how weights
are sent, and Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo.errors import StreamBroken, Transient
from grpo.weight_group import SENDER, WeightGroup
from grpo.weight_stream import WeightStream
from orchestration.waits import note_trouble


class Receiver(Protocol):
    """A rollout worker that may be sent weights."""

    has_loaded: bool  # some version, by either way

    async def device(self) -> str:
        """Whoever has the same one can open each other's memory there."""
        ...

    async def receive_weights(self, stream: WeightStream) -> None:
        """Swap the weights while they are sent; Transient: it holds none until it loads some."""
        ...

    def forget_received(self) -> None:
        """Load whatever comes next, even if a version of that number was received."""
        ...


class Senders(Protocol):
    """The ranks of the learner."""

    async def devices(self) -> list[str]:
        """Of each rank, as a receiver's."""
        ...

    async def meet(self, rank: int) -> tuple[str, int]:
        """Host and port where a new group can meet this rank."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    """A rank of the learner, and the workers that it sends weights to."""

    rank: int
    group: WeightGroup
    workers: Sequence[Receiver]


class WeightBroadcast:
    """Circles of ranks and workers, which stay as long as all of them are there."""

    def __init__(
        self,
        workers: Callable[[], Sequence[Receiver]],
        *,
        processes_per_worker: int,
        deadline_s: float,
        is_local: bool = False,
    ) -> None:
        """`workers`: all that are alive, as far as is known; each has so long for a version.

        `is_local`: each gets weights from a rank on its own device; else rank 0 sends to all.
        """
        self._workers = workers
        self._processes_per_worker = processes_per_worker
        self._deadline_s = deadline_s
        self._is_local = is_local
        self._members: list[Receiver] = []
        self._circles: list[Circle] | None = None  # None: the members have to meet

    def forget(self) -> None:
        """The learner is another one, or a member is missing."""
        self._circles = None

    async def circles(self, ranks: Senders) -> list[Circle]:
        """Those that take part in the next version."""
        for worker in self._workers():
            worker.forget_received()
        members = [worker for worker in self._workers() if worker.has_loaded]
        if self._circles is None or members != self._members:
            self._circles = None  # should a rank be lost now
            self._circles = await self._met(ranks, members)
            self._members = members
        return self._circles

    async def received(self, version: int) -> None:
        """When every member has the version, or has failed to get it."""
        calls = [
            self._failure(worker, WeightStream(group=c.group, first_rank=first, version=version))
            for c in self._circles or ()
            for worker, first in zip(c.workers, self._first_ranks(c.group), strict=True)
        ]
        failures = await asyncio.gather(*calls)
        causes = [failure for failure in failures if failure is not None]
        if causes:
            self.forget()
            note_trouble(
                f"version {version} did not reach {len(causes)} of {len(failures)} rollout workers "
                f"directly, and they load it from the object store: {causes[0]}"
            )

    def _first_ranks(self, group: WeightGroup) -> range:
        return range(SENDER + 1, group.size, self._processes_per_worker)

    async def _met(self, ranks: Senders, members: Sequence[Receiver]) -> list[Circle]:
        circles = []
        for rank, workers in (await self._shared_out(ranks, members)).items():
            host, port = await ranks.meet(rank)
            size = 1 + len(workers) * self._processes_per_worker
            group = WeightGroup(host=host, port=port, size=size, is_local=self._is_local)
            circles.append(Circle(rank=rank, group=group, workers=workers))
        return circles

    async def _shared_out(
        self, ranks: Senders, members: Sequence[Receiver]
    ) -> dict[int, list[Receiver]]:
        """The workers that each rank sends to."""
        if not self._is_local:
            return {0: list(members)} if members else {}
        devices = await ranks.devices()
        shared: dict[int, list[Receiver]] = {}
        for worker in members:
            device = await _known_device(worker)
            if device in devices:
                shared.setdefault(devices.index(device), []).append(worker)
        if lonely := len(members) - sum(map(len, shared.values())):
            note_trouble(
                f"{lonely} of {len(members)} rollout workers are on no device of a learner rank: "
                "they load new weights from the object store"
            )
        return shared

    async def _failure(self, worker: Receiver, stream: WeightStream) -> Transient | None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await worker.receive_weights(stream)
        except TimeoutError:
            return StreamBroken(f"a worker has not answered for {self._deadline_s:g} s")
        except Transient as error:
            return error
        return None


async def _known_device(worker: Receiver) -> str | None:
    """None: it is lost, which its pool will find out."""
    try:
        return await worker.device()
    except Transient:
        return None
