"""Brings up the roles of a recipe, on a cluster or in this process, and takes them down again.

The only place that knows both sides: above it there are Protocols, below it actors or objects.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from grpo.engines import RolloutEngine
from grpo.errors import root_cause
from learner.environment import thread_environment
from orchestration.config import Recipe
from orchestration.group_task import ScorerRole
from orchestration.placement import Room
from orchestration.places import Spawner
from orchestration.pool import ActorPool
from orchestration.rollout_pool import RolloutPool
from orchestration.scaling import ROLLOUT
from orchestration.scorer_pool import ScorerPool, ScorerWorker, scorer_metrics
from orchestration.training_step import StepLearner
from orchestration.waits import Waits
from rollout_workers.environment import engine_environment
from rollout_workers.worker import RolloutWorker

if TYPE_CHECKING:
    from orchestration.local import LocalLearner

W = TypeVar("W")
START_DEADLINE_S = 900.0  # loading a large model from a slow disk
WORKER_RETRIES = 3


class Learner(StepLearner, Protocol):
    """A learner that can also be checkpointed and ended."""

    async def snapshot(self) -> None: ...

    async def write(self, folder: Path) -> Sequence[str]: ...

    async def load(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


class Restartable(Protocol):
    """A learner that can be started again, with as many ranks as wanted and nothing loaded."""

    num_ranks: int

    async def restart(self, num_ranks: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everything that the driver drives."""

    engine: RolloutPool
    scorers: Mapping[str, ScorerRole]
    learner: Learner
    restartable: Restartable | None  # the same learner; None: it lives and dies with the driver
    scorer_pools: Mapping[str, ScorerPool]
    batch_sizes: Mapping[str, int]  # of the scorers
    room: Callable[[], Room] | None  # what the cluster has; None: the roles cannot be resized

    async def scorer_metrics(self) -> dict[str, float]:
        """How every scorer fares, as metrics of the run so far."""
        metrics: dict[str, float] = {}
        for name, pool in self.scorer_pools.items():
            counters = await pool.statistics()
            metrics |= scorer_metrics(name, counters, batch_size=self.batch_sizes[name])
        return metrics

    @property
    def pools(self) -> dict[str, ActorPool[Any]]:
        """By their names in `covey scale`."""
        return {ROLLOUT: self.engine.pool, **{n: s.pool for n, s in self.scorer_pools.items()}}

    @property
    def num_replaced(self) -> dict[str, int]:
        """Workers that were lost and replaced, by role."""
        pools = {"rollout worker": self.engine.pool.num_replaced}
        pools |= {f"scorer {n}": pool.pool.num_replaced for n, pool in self.scorer_pools.items()}
        return {role: count for role, count in pools.items() if count}


def local_recipe(recipe: Recipe) -> Recipe:
    """The same run for one process: the small engine and the small backend, one of each."""
    small = {"engine": "transformers", "workers": 1, "weight_transport": "object_store"}
    small |= {"quantization": None, "kv_cache_dtype": None}
    rollout = recipe.rollout.model_copy(update=small)
    alone = {"backend": "torch", "ranks": 1, "sequence_parallel": 1}
    learner = recipe.learner.model_copy(update=alone)
    return recipe.model_copy(update={"rollout": rollout, "learner": learner})


@asynccontextmanager
async def started_roles(
    recipe: Recipe, *, local: bool, waits: Waits, on_phase: Callable[[str], None]
) -> AsyncIterator[Roles]:
    """All roles, ready to work; they are gone when the block ends, however it ends."""
    if local:
        make = local_parts(recipe)
    else:
        on_phase("starting Ray")
        make = _cluster_parts(recipe)
    on_phase("starting rollout workers, scorers and learner")
    async with started_parts(recipe, make, waits=waits) as roles:
        yield roles


@asynccontextmanager
async def started_parts(recipe: Recipe, make: Parts, *, waits: Waits) -> AsyncIterator[Roles]:
    """The same from given parts: pools of the recipe's sizes around them."""
    async with _background() as tasks:
        engine, scorers = _pools(recipe, make, tasks, waits)
        try:
            async with asyncio.TaskGroup() as starting:
                learner = starting.create_task(
                    waits.within(START_DEADLINE_S, "learner: starting", make.start_learner())
                )
                if recipe.shares_gpus:
                    # A rank fits on no GPU that two workers have taken, and vLLM measures what
                    # others leave it.
                    await learner
                starting.create_task(engine.pool.start(recipe.rollout.workers))
                for config in recipe.scorers:
                    starting.create_task(scorers[config.name].pool.start(config.actors))
            yield Roles(
                engine=engine,
                scorers={
                    config.name: ScorerRole(
                        scorer=scorers[config.name],
                        stop_on_failure=config.on_failure == "stop",
                        max_failure_rate=config.max_failure_rate,
                        learning=scorers[config.name] if config.learns else None,
                    )
                    for config in recipe.scorers
                },
                learner=make.learner,
                restartable=make.restartable,
                scorer_pools=scorers,
                batch_sizes={config.name: config.batch_size for config in recipe.scorers},
                room=make.room,
            )
        finally:
            await engine.pool.close()
            for scorer in scorers.values():
                await scorer.pool.close()
            await make.close()


def _pools(
    recipe: Recipe, make: Parts, tasks: asyncio.TaskGroup, waits: Waits
) -> tuple[RolloutPool, dict[str, ScorerPool]]:
    """Without workers so far."""

    def pool(role: str, spawner: Spawner[W], retries: int) -> ActorPool[W]:
        return ActorPool(
            role,
            spawner,
            tasks=tasks,
            retries=retries,
            # The service of a scorer holds the deadline of every call; this is for a lost service.
            deadline_s=recipe.alarms.worker_s,
            start_deadline_s=START_DEADLINE_S,
            waits=waits,
        )

    scorers = {
        config.name: ScorerPool(
            config.name,
            pool(f"scorer {config.name}", make.scorer_spawners[config.name], config.retries),
        )
        for config in recipe.scorers
    }
    return RolloutPool(pool("rollout worker", make.rollout_spawner, WORKER_RETRIES)), scorers


@asynccontextmanager
async def _background() -> AsyncIterator[asyncio.TaskGroup]:
    """What goes on beside the block; the first error of either comes out as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


@asynccontextmanager
async def started_learner(
    recipe: Recipe, *, on_phase: Callable[[str], None]
) -> AsyncIterator[Learner]:
    """The learner without the other roles: in this process if it is one rank, else as actors."""
    if recipe.learner.ranks == 1:
        on_phase("starting the learner")
        local = local_learner(recipe, asyncio.Lock())
        await local.start()
        try:
            yield local
        finally:
            await local.close()
        return
    # Imported here: one rank needs no Ray.
    from orchestration import cluster, learner_handles

    on_phase(f"starting Ray and {recipe.learner.ranks} learner ranks")
    cluster.connect(recipe)
    try:
        learner = learner_handles.RayLearner(
            recipe, thread_environment(recipe.learner.cpus_per_rank)
        )
        await learner.start(_learner_arguments(recipe))
        yield learner
    finally:
        cluster.disconnect()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """How one kind of place makes the roles."""

    rollout_spawner: Spawner[RolloutEngine]
    scorer_spawners: Mapping[str, Spawner[ScorerWorker]]
    learner: Learner
    start_learner: Callable[[], Any]
    restartable: Restartable | None = None
    close: Callable[[], Any]
    room: Callable[[], Room] | None = None  # None: in this process, or not to be asked


def _learner_arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "model": recipe.model,
        "config": recipe.learner,
        "algorithm": recipe.algorithm.model_dump(mode="json"),
        "total_steps": recipe.steps,
        "temperature": recipe.sampling.temperature,
        "seed": recipe.seed,
    }


def local_parts(recipe: Recipe) -> Parts:
    """Every role as an object in this process."""
    # Imported here: a run on a cluster need not load torch into the driver.
    from orchestration.local import LocalRolloutSpawner, LocalScorerSpawner

    loading = asyncio.Lock()
    learner = local_learner(recipe, loading)
    return Parts(
        rollout_spawner=LocalRolloutSpawner(
            lambda: RolloutWorker(
                recipe.model,
                recipe.rollout,
                recipe.max_model_len,
                recipe.learner.published_adapters,
            ),
            loading,
        ),
        scorer_spawners={s.name: LocalScorerSpawner(s) for s in recipe.scorers},
        learner=learner,
        start_learner=learner.start,
        close=learner.close,
    )


def local_learner(recipe: Recipe, loading: asyncio.Lock) -> LocalLearner:
    """One rank in this process, not started; `loading` is held while any model is loaded."""
    # Imported here, as above.
    from learner.rank import LearnerRank
    from orchestration.local import LocalLearner

    with socket.socket() as probe:  # DeepSpeed opens a port even for one rank
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    rank = LearnerRank(**_learner_arguments(recipe), rank=0, world_size=1, master=master)
    return LocalLearner(rank, loading)


def _cluster_parts(recipe: Recipe) -> Parts:
    # Imported here: a local run needs no Ray.
    from orchestration import cluster, handles, learner_handles
    from orchestration.weight_broadcast import WeightBroadcast

    cluster.connect(recipe)
    spawner = handles.RayRolloutSpawner(
        recipe,
        recipe.model,
        recipe.max_model_len,
        engine_environment(recipe.rollout, recipe.model),
    )
    broadcast = None
    if recipe.sends_weights:
        broadcast = WeightBroadcast(
            lambda: spawner.workers,
            processes_per_worker=recipe.rollout.tensor_parallel_size,
            deadline_s=recipe.alarms.worker_s,
            is_local=recipe.rollout.weight_transport == "ipc",
        )
    threads = thread_environment(recipe.learner.cpus_per_rank)
    learner = learner_handles.RayLearner(recipe, threads, broadcast)

    async def close() -> None:
        cluster.disconnect()

    return Parts(
        rollout_spawner=spawner,
        scorer_spawners={s.name: handles.RayScorerSpawner(s) for s in recipe.scorers},
        learner=learner,
        start_learner=lambda: learner.start(_learner_arguments(recipe)),
        restartable=learner,
        close=close,
        room=cluster.room,
    )
