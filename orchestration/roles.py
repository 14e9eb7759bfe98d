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
from typing import TYPE_CHECKING, Any, Protocol

from grpo.engines import RolloutEngine
from learner.environment import thread_environment
from orchestration.config import Recipe
from orchestration.group_task import ScorerRole
from orchestration.pool import ActorPool, RolloutPool, Spawner
from orchestration.scorer_pool import ScorerPool, ScorerWorker, scorer_metrics
from orchestration.training_step import StepLearner
from orchestration.waits import Waits
from rollout_workers.environment import engine_environment
from rollout_workers.worker import RolloutWorker

if TYPE_CHECKING:
    from orchestration.local import LocalLearner

START_DEADLINE_S = 900.0  # loading a large model from a slow disk
WORKER_RETRIES = 3


class Learner(StepLearner, Protocol):
    """A learner that can also be checkpointed and ended."""

    async def snapshot(self) -> None: ...

    async def write(self, folder: Path) -> Sequence[str]: ...

    async def load(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everything that the driver drives."""

    engine: RolloutPool
    scorers: Mapping[str, ScorerRole]
    learner: Learner
    scorer_pools: Mapping[str, ScorerPool]
    batch_sizes: Mapping[str, int]  # of the scorers

    async def scorer_metrics(self) -> dict[str, float]:
        """How every scorer fares, as metrics of the run so far."""
        metrics: dict[str, float] = {}
        for name, pool in self.scorer_pools.items():
            counters = await pool.statistics()
            metrics |= scorer_metrics(name, counters, batch_size=self.batch_sizes[name])
        return metrics

    @property
    def num_replaced(self) -> dict[str, int]:
        """Workers that were lost and replaced, by role."""
        pools = {"rollout worker": self.engine.pool.num_replaced}
        pools |= {f"scorer {n}": pool.pool.num_replaced for n, pool in self.scorer_pools.items()}
        return {role: count for role, count in pools.items() if count}


def local_recipe(recipe: Recipe) -> Recipe:
    """The same run for one process: the small engine and the small backend, one of each."""
    rollout = recipe.rollout.model_copy(update={"engine": "transformers", "workers": 1})
    alone = {"backend": "torch", "ranks": 1, "sequence_parallel": 1}
    learner = recipe.learner.model_copy(update=alone)
    return recipe.model_copy(update={"rollout": rollout, "learner": learner})


@asynccontextmanager
async def started_roles(
    recipe: Recipe, *, local: bool, waits: Waits, on_phase: Callable[[str], None]
) -> AsyncIterator[Roles]:
    """All roles, ready to work; they are gone when the block ends, however it ends."""
    if local:
        make = _local_parts(recipe)
    else:
        on_phase("starting Ray")
        make = _cluster_parts(recipe)
    on_phase("starting rollout workers, scorers and learner")
    async with started_parts(recipe, make, waits=waits) as roles:
        yield roles


@asynccontextmanager
async def started_parts(recipe: Recipe, make: Parts, *, waits: Waits) -> AsyncIterator[Roles]:
    """The same from given parts: pools of the recipe's sizes around them."""
    engine = RolloutPool(
        make.rollout_spawner,
        retries=WORKER_RETRIES,
        deadline_s=recipe.alarms.worker_s,
        start_deadline_s=START_DEADLINE_S,
        waits=waits,
    )
    scorers = {
        config.name: ScorerPool(
            config.name,
            ActorPool(
                f"scorer {config.name}",
                make.scorer_spawners[config.name],
                retries=config.retries,
                # The service holds the deadline of every call; this one is for a lost service.
                deadline_s=recipe.alarms.worker_s,
                start_deadline_s=START_DEADLINE_S,
                waits=waits,
            ),
        )
        for config in recipe.scorers
    }
    try:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(engine.pool.start(recipe.rollout.workers))
            for config in recipe.scorers:
                starting.create_task(scorers[config.name].pool.start(config.actors))
            starting.create_task(
                waits.within(START_DEADLINE_S, "learner: starting", make.start_learner())
            )
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
            scorer_pools=scorers,
            batch_sizes={config.name: config.batch_size for config in recipe.scorers},
        )
    finally:
        await engine.pool.close()
        for scorer in scorers.values():
            await scorer.pool.close()
        await make.close()


@asynccontextmanager
async def started_learner(
    recipe: Recipe, *, on_phase: Callable[[str], None]
) -> AsyncIterator[Learner]:
    """The learner without the other roles: in this process if it is one rank, else as actors."""
    if recipe.learner.ranks == 1:
        on_phase("starting the learner")
        local = _local_learner(recipe, asyncio.Lock())
        await local.start()
        try:
            yield local
        finally:
            await local.close()
        return
    # Imported here: one rank needs no Ray.
    from orchestration import handles

    on_phase(f"starting Ray and {recipe.learner.ranks} learner ranks")
    handles.connect(recipe)
    try:
        learner = handles.RayLearner(recipe, thread_environment(recipe.learner.cpus_per_rank))
        await learner.start(_learner_arguments(recipe))
        yield learner
    finally:
        handles.disconnect()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """How one kind of place makes the roles."""

    rollout_spawner: Spawner[RolloutEngine]
    scorer_spawners: Mapping[str, Spawner[ScorerWorker]]
    learner: Learner
    start_learner: Callable[[], Any]
    close: Callable[[], Any]


def _learner_arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "model": recipe.model,
        "config": recipe.learner,
        "algorithm": recipe.algorithm.model_dump(mode="json"),
        "total_steps": recipe.steps,
        "temperature": recipe.sampling.temperature,
        "seed": recipe.seed,
    }


def _local_parts(recipe: Recipe) -> Parts:
    # Imported here: a run on a cluster need not load torch into the driver.
    from orchestration.local import LocalRolloutSpawner, LocalScorerSpawner

    loading = asyncio.Lock()
    learner = _local_learner(recipe, loading)
    return Parts(
        rollout_spawner=LocalRolloutSpawner(
            lambda: RolloutWorker(recipe.model, recipe.rollout, recipe.max_model_len), loading
        ),
        scorer_spawners={s.name: LocalScorerSpawner(s) for s in recipe.scorers},
        learner=learner,
        start_learner=learner.start,
        close=learner.close,
    )


def _local_learner(recipe: Recipe, loading: asyncio.Lock) -> LocalLearner:
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
    from orchestration import handles

    handles.connect(recipe)
    learner = handles.RayLearner(recipe, thread_environment(recipe.learner.cpus_per_rank))

    async def close() -> None:
        handles.disconnect()

    return Parts(
        rollout_spawner=handles.RayRolloutSpawner(
            recipe,
            recipe.model,
            recipe.max_model_len,
            engine_environment(recipe.rollout, recipe.model),
        ),
        scorer_spawners={s.name: handles.RayScorerSpawner(s) for s in recipe.scorers},
        learner=learner,
        start_learner=lambda: learner.start(_learner_arguments(recipe)),
        close=close,
    )
