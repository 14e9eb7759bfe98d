"""The roles of a run as Ray actors: the one file that wraps plain classes and translates failures.

No actor calls another; only the driver calls, through these handles. Batches and weights travel
by object reference. Refuses to know algorithms and schedules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle

from grpo.engines import RolloutEngine
from grpo.errors import CoveyError, Fatal, StateLost, Transient, UserError, WorkerLost
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
from orchestration.cluster_address import require_listener
from orchestration.config import Recipe
from orchestration.placement import Room, room_of, shortage, total
from orchestration.scorer_pool import ScorerWorker
from orchestration.waiting import Whereabouts
from orchestration.waits import note_whereabouts, waiting_for
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from rollout_workers.worker import RolloutWorker

# Groups that may wait in one worker at a time; the engine batches them itself.
MAX_CONCURRENT_CALLS = 10_000
LOSS_NOTICED_S = 10.0  # Ray reports a killed process within a second or two
# Where covey starts Ray itself CPUs are book-keeping, and a pool may grow beyond the cores; Ray
# starts no more processes for it. GPUs are counted as they are.
LOGICAL_CPUS = 16  # for each core
WRITING = "writing"  # Ray's concurrency group of what a learner rank does beside its other calls


def connect(recipe: Recipe) -> bool:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; True if it was started."""
    # Authentication stays on, and Ray need not warn about it at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        require_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    else:
        cpus, _ = total(recipe)
        ray.init(
            num_cpus=max(LOGICAL_CPUS * (os.cpu_count() or 1), ceil(cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
    problem = shortage(recipe, ray.cluster_resources())
    if problem:
        ray.shutdown()
        raise UserError(problem)
    return not address


def room() -> Room:
    """As of now, on all nodes together."""
    return room_of(ray.cluster_resources(), ray.available_resources())


def disconnect() -> None:
    """Leave the cluster; ends it if `connect` started it."""
    ray.shutdown()


async def _answer(reference: Any) -> Any:
    """The result of an actor call; failures come out as the kinds of grpo.errors."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CoveyError):
            raise cause from None
        raise Fatal(f"an actor raised {type(cause).__name__}: {cause}\n{error}") from error
    except ray.exceptions.RayActorError as error:
        raise WorkerLost(_in_short(error)) from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(_in_short(error)) from error


def _whereabouts(actor: object) -> Whereabouts:
    """Runs in the actor. Ray has put files in the place of standard output and error."""
    logs = [os.readlink(f"/proc/self/fd/{stream}") for stream in (1, 2)]
    return Whereabouts(
        pid=os.getpid(), node=ray.util.get_node_ip_address(), logs=tuple(dict.fromkeys(logs))
    )


async def _located(actor: ActorHandle[Any], owner: str | None = None) -> None:
    """Register where an actor runs, before anything is asked of it that could hang."""
    note_whereabouts(await _answer(actor.__ray_call__.remote(_whereabouts)), owner)


async def _started(actor: ActorHandle[Any]) -> ActorHandle[Any]:
    """The actor once it is ready; one that is not wanted any more leaves no process behind."""
    try:
        await _located(actor)
        await _answer(actor.start.remote())
    except BaseException:
        ray.kill(actor)
        raise
    return actor


def _rank(place: int) -> str:
    return f"learner rank {place}"


def _in_short(error: Exception) -> str:
    """Ray's sentence about the cause, without ids and general advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Worker exit" in line or "died" in line]
    sentence = (causes or lines or [type(error).__name__])[-1 if causes else 0]
    return sentence.partition(" Some common causes")[0]


class RayRolloutWorker:
    """A rollout worker on some node, as a RolloutEngine."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        result: list[Rollout] = await _answer(self.actor.sample.remote(list(requests)))
        return result

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        result: LoadReport = await _answer(self.actor.load_weights.remote(ref.location))
        return result


class RayRolloutSpawner:
    """Makes rollout workers as actors, each with the environment that its engine wants."""

    def __init__(
        self, recipe: Recipe, model: str, max_model_len: int, environment: Mapping[str, str]
    ) -> None:
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
        return RayRolloutWorker(await _started(self._actor_class.remote(*self._arguments)))

    async def discard(self, worker: RolloutEngine) -> None:
        assert isinstance(worker, RayRolloutWorker)
        ray.kill(worker.actor)


class RayScorer:
    """A scorer service on some node, as a Scorer."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        result: list[Score] = await _answer(self.actor.score.remote(group, list(spans)))
        return result

    async def statistics(self) -> Mapping[str, float]:
        result: Mapping[str, float] = await _answer(self.actor.statistics_so_far.remote())
        return result

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        result: Mapping[str, float] = await _answer(self.actor.learn.remote(list(groups)))
        return result

    async def save(self, folder: Path) -> None:
        await _answer(self.actor.save.remote(folder))

    async def load(self, folder: Path) -> None:
        await _answer(self.actor.load.remote(folder))


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
    def publish(self, version: int) -> tuple[tuple[int, int] | None, WeightBundle | None]:
        """(size and checksum, the bundle): two results, so that the driver fetches the first."""
        bundle = self.rank.publish(version)
        if bundle is None:
            return None, None
        return (bundle.payload.nbytes, bundle.checksum), bundle

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

    def __init__(self, recipe: Recipe, environment: Mapping[str, str]) -> None:
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
        self._ranks = [self._actor_class.remote() for _ in range(self.num_ranks)]
        await self._all([_located(rank, _rank(i)) for i, rank in enumerate(self._ranks)])
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
        parts = [rank.publish.remote(version) for rank in self._ranks]
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

    async def _all(self, calls: Sequence[Any]) -> list[Any]:
        """Every rank's result; the first failure ends the wait for the others."""
        tasks = [
            asyncio.create_task(waiting_for(_rank(i), _answer(call)))
            for i, call in enumerate(calls)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        except CoveyError as error:
            lost = await _lost_rank(tasks) if _may_follow_from_a_loss(error) else None
            if lost is None:
                raise
            rank, reason = lost
            told = StateLost(f"the learner is lost: {reason}")
            told.owner = _rank(rank)
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
