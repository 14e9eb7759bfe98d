"""The learner as Ray actors, one for each rank, and all of them together as one learner.

Batches travel by object reference. A rank that is gone takes the others with it: what they held is
lost (`StateLost`), and they can be started again. Refuses to know steps and checkpoints.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from grpo.errors import CoveyError, Fatal, StateLost, Transient, WorkerLost
from grpo.types import (
    Float32,
    MeasureRequest,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightBundle,
    WeightRef,
)
from grpo.weight_group import WeightGroup
from learner.rank import LearnerRank
from orchestration.cluster import answer, device_of, located
from orchestration.config import Recipe
from orchestration.waits import waiting_for
from orchestration.weight_broadcast import WeightBroadcast

LOSS_NOTICED_S = 10.0  # Ray reports a killed process within a second or two
WRITING = "writing"  # Ray's concurrency group of what a learner rank does beside its other calls


class LearnerActor:
    """One learner rank as an actor: knows its node before it joins the others."""

    def __init__(self) -> None:
        self._rank: LearnerRank | None = None

    def free_address(self) -> str:
        """host:port on this node where the ranks can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, arguments: Mapping[str, Any]) -> None:
        self._rank = LearnerRank(**arguments)
        self._rank.start()

    @property
    def rank(self) -> LearnerRank:
        assert self._rank is not None, "start() comes first"
        return self._rank

    def train(self, batch: TrainBatch) -> StepReport:
        return self.rank.train(batch)

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]  # Ray does not annotate it
    def measure(self, request: MeasureRequest) -> tuple[None, Mapping[str, list[list[Float32]]]]:
        """(done, the streams): two results, as all ranks have the same and one fetch is enough."""
        return None, self.rank.measure(request)

    def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return self.rank.log_probs(rows)

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]  # Ray does not annotate it
    def publish(
        self, version: int, group: WeightGroup | None
    ) -> tuple[tuple[int, int] | None, WeightBundle | None]:
        """(size and checksum, the bundle): two results, so that the driver fetches the first."""
        bundle = self.rank.publish(version, group)
        if bundle is None:
            return None, None
        return (bundle.payload.nbytes, bundle.checksum), bundle

    def open_group(self) -> tuple[str, int]:
        """Host and port where rollout workers can meet this rank."""
        host = str(ray.util.get_node_ip_address())
        return host, self.rank.open_group(host)

    def snapshot(self) -> None:
        self.rank.snapshot()

    @ray.method(concurrency_group=WRITING)  # type: ignore[untyped-decorator]  # as above
    def write(self, folder: str) -> list[str]:
        """In a thread of its own, so that the next step need not wait for it."""
        return self.rank.write(folder)

    def load(self, folder: str) -> None:
        self.rank.load(folder)

    def close(self) -> None:
        self.rank.close()


class RayLearner:
    """All ranks together, as one PolicyLearner: every call goes to every rank."""

    def __init__(
        self,
        recipe: Recipe,
        environment: Mapping[str, str],
        broadcast: WeightBroadcast | None = None,
    ) -> None:
        """`broadcast`: who is sent each version beside it; None: all load it from its location."""
        self._broadcast = broadcast
        self.num_ranks = recipe.learner.ranks
        # All else stays in the one thread of the default group.
        self._actor_class = ray.remote(concurrency_groups={WRITING: 1})(LearnerActor).options(
            num_cpus=recipe.learner.cpus_per_rank,
            num_gpus=recipe.learner.gpus_per_rank,
            runtime_env={"env_vars": dict(environment)},
        )
        self._arguments: Mapping[str, Any] = {}
        self._ranks: list[ActorHandle[Any]] = []

    async def start(self, arguments: Mapping[str, Any]) -> None:
        """`arguments` of LearnerRank but for its place among the ranks."""
        self._arguments = arguments
        if self._broadcast is not None:
            self._broadcast.forget()
        self._ranks = [self._actor_class.remote() for _ in range(self.num_ranks)]
        await self._all([located(rank, _rank(i)) for i, rank in enumerate(self._ranks)])
        (master,) = await self._all([self._ranks[0].free_address.remote()])
        calls = [
            rank.start.remote(
                {**arguments, "rank": i, "world_size": self.num_ranks, "master": master}
            )
            for i, rank in enumerate(self._ranks)
        ]
        await self._all(calls)

    async def restart(self, num_ranks: int) -> None:
        """End all ranks, whatever state they are in, and start so many new ones."""
        await self.close()
        self.num_ranks = num_ranks
        await self.start(self._arguments)

    async def train(self, batch: TrainBatch) -> StepReport:
        reference = ray.put(batch)
        reports = await self._all([rank.train.remote(reference) for rank in self._ranks])
        report: StepReport = reports[0]
        return report

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        reference = ray.put(request)
        parts = [rank.measure.remote(reference) for rank in self._ranks]
        await self._all([done for done, _ in parts])
        (streams,) = await self._all([parts[0][1]])
        result: Mapping[str, list[list[Float32]]] = streams
        return result

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        reference = ray.put(list(rows))
        values = await self._all([rank.log_probs.remote(reference) for rank in self._ranks])
        result: list[list[float]] = values[0]
        return result

    async def publish(self, version: int) -> WeightRef:
        groups = await self._groups()
        parts = [rank.publish.remote(version, groups.get(i)) for i, rank in enumerate(self._ranks)]
        async with self._broadcasting(version):
            described = await self._all([description for description, _ in parts])
        num_bytes, checksum = described[0]
        return WeightRef(
            version=version, num_bytes=num_bytes, checksum=checksum, location=parts[0][1]
        )

    async def snapshot(self) -> None:
        await self._all([rank.snapshot.remote() for rank in self._ranks])

    async def write(self, folder: Path) -> list[str]:
        files = await self._all([rank.write.remote(str(folder)) for rank in self._ranks])
        return [file for of_rank in files for file in of_rank]

    async def load(self, folder: Path) -> None:
        await self._all([rank.load.remote(str(folder)) for rank in self._ranks])

    async def close(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)

    async def devices(self) -> list[str]:
        """Of each rank: whoever has the same one can open its memory there."""
        return await self._all([device_of(rank) for rank in self._ranks])

    async def meet(self, rank: int) -> tuple[str, int]:
        """Host and port where a new group can meet this rank."""
        (place,) = await self._all([self._ranks[rank].open_group.remote()], first=rank)
        host, port = place
        return host, port

    async def _groups(self) -> dict[int, WeightGroup]:
        """Whom each rank sends the next version; absent: nobody."""
        if self._broadcast is None:
            return {}
        circles = await self._broadcast.circles(self)
        return {circle.rank: circle.group for circle in circles}

    @asynccontextmanager
    async def _broadcasting(self, version: int) -> AsyncIterator[None]:
        """Workers receive what the ranks send in this block; it ends when both are done."""
        if self._broadcast is None:
            yield
            return
        what = f"rollout workers: receiving version {version}"
        receiving = asyncio.create_task(waiting_for(what, self._broadcast.received(version)))
        try:
            yield
            await receiving
        finally:
            receiving.cancel()

    async def _all(self, calls: Sequence[Any], first: int = 0) -> list[Any]:
        """The results of all ranks from `first` on; a failure ends the wait for the others."""
        tasks = [
            asyncio.create_task(waiting_for(_rank(i), answer(call)))
            for i, call in enumerate(calls, first)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        except CoveyError as error:
            lost = await _lost_rank(tasks) if _may_follow_from_a_loss(error) else None
            if lost is None:
                raise
            rank, reason = lost
            told = StateLost(f"the learner is lost: {reason}")
            told.owner = _rank(first + rank)
            raise told from error
        finally:
            for task in tasks:
                task.cancel()


def _may_follow_from_a_loss(error: CoveyError) -> bool:
    """A rank that misses another one's part raises what nobody classified."""
    return type(error) is Fatal or isinstance(error, Transient)


async def _lost_rank(tasks: Sequence[asyncio.Task[Any]]) -> tuple[int, WorkerLost] | None:
    """The first rank whose process is gone, if there is one: Ray may notice after the others."""
    pending = set(tasks)
    with suppress(TimeoutError):
        async with asyncio.timeout(LOSS_NOTICED_S):
            while pending:
                for rank, task in enumerate(tasks):
                    error = task.exception() if task.done() and not task.cancelled() else None
                    if isinstance(error, WorkerLost):
                        return rank, error
                pending = {task for task in tasks if not task.done()}
                if pending:
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    return None


def _rank(place: int) -> str:
    return f"learner rank {place}"
