"""The roles of a run as plain objects in this process: no cluster, no actor, the same driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from grpo.engines import RolloutEngine
from grpo.types import (
    Float32,
    Group,
    LoadReport,
    MeasureRequest,
    Rollout,
    SampleRequest,
    Score,
    Span,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightBundle,
    WeightRef,
)
from learner.rank import LearnerRank
from orchestration.scorer_pool import ScorerWorker
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from rollout_workers.worker import RolloutWorker

T = TypeVar("T")


class LocalRolloutWorker:
    """A rollout worker in this process, as a RolloutEngine."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        return await self.worker.sample(requests)

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        return await self.worker.load_weights(cast(WeightBundle, ref.location))


class LocalRolloutSpawner:
    """Makes rollout workers in this process."""

    def __init__(self, make: Callable[[], RolloutWorker], loading: asyncio.Lock) -> None:
        self._make = make
        self._loading = loading

    async def spawn(self, place: int) -> RolloutEngine:
        worker = self._make()
        async with self._loading:
            await worker.start()
        return LocalRolloutWorker(worker)

    async def discard(self, worker: RolloutEngine) -> None:
        assert isinstance(worker, LocalRolloutWorker)
        await worker.worker.close()


class LocalScorer:
    """A scorer service in this process."""

    def __init__(self, service: ScorerService) -> None:
        self.service = service

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        return await self.service.score(group, spans)

    async def statistics(self) -> Mapping[str, float]:
        return self.service.statistics_so_far()

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        return await self.service.learn(groups)

    async def save(self, folder: Path) -> None:
        await self.service.save(folder)

    async def load(self, folder: Path) -> None:
        await self.service.load(folder)


class LocalScorerSpawner:
    """Makes scorer services in this process."""

    def __init__(self, config: ScorerConfig) -> None:
        self._config = config

    async def spawn(self, place: int) -> ScorerWorker:
        service = ScorerService(self._config)
        await service.start()
        return LocalScorer(service)

    async def discard(self, worker: ScorerWorker) -> None:
        assert isinstance(worker, LocalScorer)
        await worker.service.close()


class LocalLearner:
    """One learner rank in this process; its blocking work runs in a thread of its own."""

    def __init__(self, rank: LearnerRank, loading: asyncio.Lock) -> None:
        """`loading` is shared by all that load a model here: transformers' loader sets a default
        device for the whole process, so two at a time would leave parameters uninitialised.
        """
        self._rank = rank
        self._loading = loading
        self._is_started = False
        self._busy = asyncio.Lock()  # the rank is no more thread-safe than an actor is

    async def start(self) -> None:
        async with self._loading:
            await self._call(self._rank.start)
        self._is_started = True

    async def train(self, batch: TrainBatch) -> StepReport:
        return await self._call(lambda: self._rank.train(batch))

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        return await self._call(lambda: self._rank.measure(request))

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return await self._call(lambda: self._rank.log_probs(rows))

    async def publish(self, version: int) -> WeightRef:
        bundle = await self._call(lambda: self._rank.publish(version))
        assert bundle is not None, "rank 0 holds the bundle"
        return WeightRef(
            version=version,
            num_bytes=bundle.payload.nbytes,
            checksum=bundle.checksum,
            location=bundle,
        )

    async def snapshot(self) -> None:
        await self._call(self._rank.snapshot)

    async def write(self, folder: Path) -> list[str]:
        return await asyncio.to_thread(self._rank.write, str(folder))  # beside other calls

    async def load(self, folder: Path) -> None:
        await self._call(lambda: self._rank.load(str(folder)))

    async def close(self) -> None:
        if self._is_started:  # else there is nothing to end, and an error to hear of first
            await self._call(self._rank.close)

    async def _call(self, work: Callable[[], T]) -> T:
        async with self._busy:
            return await asyncio.to_thread(work)
