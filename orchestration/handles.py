"""Rollout workers and scorers as Ray actors: plain classes, wrapped and placed.

No actor calls another; only the driver calls, through these handles. Weights travel by object
reference. Refuses to know algorithms, schedules and pools.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from grpo.engines import RolloutEngine
from grpo.types import Group, LoadReport, Rollout, SampleRequest, Score, Span, WeightRef
from grpo.weight_stream import WeightStream
from orchestration.cluster import answer, device_of, located
from orchestration.config import Recipe
from orchestration.scorer_pool import ScorerWorker
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from rollout_workers.turns import Together, Turn
from rollout_workers.worker import RolloutWorker

# Groups that may wait in one worker at a time; the engine batches them itself.
MAX_CONCURRENT_CALLS = 10_000


@dataclass(slots=True, kw_only=True, eq=False)
class _SampleCall:
    """Rollouts of one group that are asked for, and Ray's reference to them once they are."""

    requests: list[SampleRequest]
    answer: Any = None


class RayRolloutWorker:
    """A rollout worker on some node, as a RolloutEngine."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor
        self._turn = Turn(self._hand_over)
        self._turns = itertools.count()
        self.has_loaded = False
        # (version, seconds by phase) of what came by broadcast and nobody has asked for yet.
        self._received: tuple[int, Mapping[str, float]] | None = None

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        call = _SampleCall(requests=list(requests))
        await self._turn.join([call])
        try:
            result: list[Rollout] = await answer(call.answer)
        except asyncio.CancelledError:
            ray.cancel(call.answer)  # it would run beside those that somebody waits for
            raise
        return result

    def _hand_over(self, calls: Sequence[_SampleCall]) -> None:
        turn = next(self._turns)
        for place, call in enumerate(calls):
            together = Together(turn=turn, place=place, size=len(calls))
            call.answer = self.actor.sample.remote(call.requests, together)

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        received, self._received = self._received, None
        if received is not None and received[0] == ref.version:
            # Each bucket was checked against its own sum where it arrived.
            return LoadReport(version=ref.version, checksum=ref.checksum, timings_s=received[1])
        result: LoadReport = await answer(self.actor.load_weights.remote(ref.location))
        self.has_loaded = True
        return result

    async def device(self) -> str:
        return await device_of(self.actor)

    async def receive_weights(self, stream: WeightStream) -> None:
        timings_s = await answer(self.actor.receive_weights.remote(stream))
        self._received = (stream.version, timings_s)

    def forget_received(self) -> None:
        self._received = None


class RayRolloutSpawner:
    """Makes rollout workers as actors, each with the environment that its engine wants."""

    def __init__(
        self, recipe: Recipe, model: str, max_model_len: int, environment: Mapping[str, str]
    ) -> None:
        self.workers: list[RayRolloutWorker] = []  # not discarded so far
        self._arguments = (
            model,
            recipe.rollout,
            max_model_len,
            recipe.learner.published_adapters,
        )
        self._actor_class = ray.remote(RolloutWorker).options(
            num_cpus=recipe.rollout.cpus_per_worker,
            num_gpus=recipe.rollout.gpus_per_worker,
            max_concurrency=MAX_CONCURRENT_CALLS,
            runtime_env={"env_vars": dict(environment)},
        )

    async def spawn(self, place: int) -> RolloutEngine:
        worker = RayRolloutWorker(await _started(self._actor_class.remote(*self._arguments)))
        self.workers.append(worker)
        return worker

    async def discard(self, worker: RolloutEngine) -> None:
        assert isinstance(worker, RayRolloutWorker)
        self.workers.remove(worker)
        ray.kill(worker.actor)


class RayScorer:
    """A scorer service on some node, as a Scorer."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        result: list[Score] = await answer(self.actor.score.remote(group, list(spans)))
        return result

    async def statistics(self) -> Mapping[str, float]:
        result: Mapping[str, float] = await answer(self.actor.statistics_so_far.remote())
        return result

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        result: Mapping[str, float] = await answer(self.actor.learn.remote(list(groups)))
        return result

    async def save(self, folder: Path) -> None:
        await answer(self.actor.save.remote(folder))

    async def load(self, folder: Path) -> None:
        await answer(self.actor.load.remote(folder))


class RayScorerSpawner:
    """Makes the actors of one scorer."""

    def __init__(self, config: ScorerConfig) -> None:
        self._config = config
        self._actor_class = ray.remote(ScorerService).options(
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor,
            max_concurrency=MAX_CONCURRENT_CALLS,
        )

    async def spawn(self, place: int) -> ScorerWorker:
        return RayScorer(await _started(self._actor_class.remote(self._config)))

    async def discard(self, worker: ScorerWorker) -> None:
        assert isinstance(worker, RayScorer)
        ray.kill(worker.actor)


async def _started(actor: ActorHandle[Any]) -> ActorHandle[Any]:
    """The actor once it is ready; one that is not wanted any more leaves no process behind."""
    with ExitStack() as unfinished:
        unfinished.callback(ray.kill, actor)
        await located(actor)
        await answer(actor.start.remote())
        unfinished.pop_all()
    return actor
