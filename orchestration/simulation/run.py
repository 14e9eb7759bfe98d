"""One simulated run: the driver, buffer, pools and batch builder of a recipe around idle roles.

No files, no processes, no models, no prompts of the data set. Refuses to know the command line.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo.errors import root_cause
from grpo.types import Prompt
from orchestration.driver import Driver, TrainedStep
from orchestration.group_task import DroppedGroup, GroupRecipe
from orchestration.progress import Progress, planned_schedule
from orchestration.recipe import Recipe
from orchestration.roles import Parts, Roles, started_parts
from orchestration.simulation.clock import SimulatedLoop
from orchestration.simulation.engine import FIRST_TOKEN
from orchestration.simulation.report import SimulationReport
from orchestration.simulation.roles import (
    EngineSpawner,
    ScorerSpawner,
    SimulatedLearner,
    SimulatedTokenizer,
)
from orchestration.simulation.services import ServiceCpu, Services
from orchestration.waits import Waits

OnStep = Callable[[int, float], None]  # a step, and the simulated second at which it ended
NUM_PROMPTS = 4096  # distinct ones: an algorithm that remembers prompts meets them again


def simulated(recipe: Recipe, services: Services, on_step: OnStep) -> SimulationReport:
    """Drive the recipe to its last step; the errors are those of a run."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        try:
            return runner.run(_Simulation(recipe, services, on_step).run())
        except BaseExceptionGroup as raised:
            raise root_cause(raised) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Since the beginning of the run."""

    time_s: float = 0.0
    generated_s: float = 0.0  # of all places
    learnt_s: float = 0.0
    rollouts: float = 0.0  # trained
    waited_s: float = 0.0  # by groups that were scored
    staleness: float = 0.0  # means of the steps, added up
    max_staleness: float = 0.0


class Ledger:
    """What became of every group. A byte each, as there are many."""

    TRAINED, DROPPED = 1, 2

    def __init__(self) -> None:
        self._fates = bytearray()

    def write(self, group: int, fate: int) -> None:
        """Once for each group."""
        if group >= len(self._fates):
            self._fates.extend(bytes(group + 1 - len(self._fates)))
        assert not self._fates[group], f"group {group} ended twice"
        self._fates[group] = fate

    def count(self, fate: int) -> int:
        """Groups with this fate."""
        return self._fates.count(fate)

    def lost(self, *, admitted: int, unfinished: Sequence[int]) -> list[int]:
        """Groups that were admitted, have not ended and are not under way."""
        ended = {group for group, fate in enumerate(self._fates) if fate}
        return sorted(set(range(admitted)) - ended - set(unfinished))


class _Simulation:
    """The run, and the driver's journal of it."""

    def __init__(self, recipe: Recipe, services: Services, on_step: OnStep) -> None:
        self._recipe = recipe
        self._services = services
        self._on_step = on_step
        self._cpu = ServiceCpu()
        # Generation has its full lead on the learner only behind so many steps.
        self._warm_up = min(recipe.max_staleness + 1, recipe.steps - 1)
        self._start = self._now = _Sums()
        self._ledger = Ledger()
        self._scored_at: dict[int, float] = {}
        self._spawner = EngineSpawner(services, self._cpu, recipe.sampling.max_completion_length)
        self._learner = SimulatedLearner(services, self._cpu)

    async def run(self) -> SimulationReport:
        """Every step, then the report."""
        waits, began = Waits(), time.process_time()
        async with started_parts(self._recipe, self._parts(), waits=waits) as roles:
            driver = self._driver(roles, waits)
            await driver.run()
            cpu_s = time.process_time() - began - self._cpu.seconds
            replaced = roles.num_replaced
        progress = driver.progress
        lost = self._ledger.lost(admitted=progress.next_group, unfinished=progress.pending)
        assert not lost, f"groups {lost} are lost"
        return self._report(progress.next_group, replaced, cpu_s)

    def trained(self, step: TrainedStep) -> None:
        """A step is done and its weights are with the engines."""
        waited = trained = 0.0
        for done in step.groups:
            if done.group.id not in step.replayed:
                self._ledger.write(done.group.id, Ledger.TRAINED)
                scored_at = self._scored_at.pop(done.group.id, self._learner.began)
                waited += self._learner.began - scored_at
                trained += len(done.group.rollouts)
        before = self._now
        self._now = _Sums(
            time_s=asyncio.get_running_loop().time(),
            generated_s=sum(engine.busy_s for engine in self._spawner.engines),
            learnt_s=self._learner.busy_s,
            rollouts=before.rollouts + trained,
            waited_s=before.waited_s + waited,
            staleness=before.staleness + step.metrics["staleness/mean"],
            max_staleness=max(before.max_staleness, step.metrics["staleness/max"]),
        )
        if step.step == self._warm_up:
            self._start = self._now
        self._on_step(step.step, self._now.time_s)

    def dropped(self, group: DroppedGroup) -> None:
        """A group fell out."""
        self._ledger.write(group.group.id, Ledger.DROPPED)
        self._scored_at.pop(group.group.id, None)

    def _parts(self) -> Parts:
        return Parts(
            rollout_spawner=self._spawner,
            scorer_spawners={
                scorer.name: ScorerSpawner(scorer.name, self._services, self._cpu, self._scored_at)
                for scorer in self._recipe.scorers
            },
            learner=self._learner,
            start_learner=_nothing,
            close=_nothing,
        )

    def _driver(self, roles: Roles, waits: Waits) -> Driver:
        recipe, choice = self._recipe, self._recipe.algorithm
        pipeline = choice.algorithm.pipeline(
            choice.settings,
            outcomes=recipe.weights,
            max_completion_length=recipe.sampling.max_completion_length,
        )
        named = [source.domain for source in recipe.data.training_sources]
        domains = list(dict.fromkeys([*named, *choice.settings.domains]))
        prompts = simulated_prompts(self._services.prompt_tokens, domains)
        return Driver(
            schedule=replace(planned_schedule(recipe), checkpoint_every=0, evaluate_every=0),
            common=GroupRecipe(
                pipeline=pipeline,
                sampling=recipe.sampling.drawn(),
                run_seed=recipe.seed,
                engine=roles.engine,
                tokenizer=SimulatedTokenizer(),
                scorers=roles.scorers,
            ),
            learner=roles.learner,
            prompt_at=lambda group: prompts[group % NUM_PROMPTS],
            journal=self,
            waits=waits,
            progress=Progress(algorithm_state=pipeline.initial_state),
            evaluate=_not_simulated,
            checkpoint=_not_simulated,
            scorer_metrics=roles.scorer_metrics,
        )

    def _report(self, admitted: int, replaced: Mapping[str, int], cpu_s: float) -> SimulationReport:
        recipe, now, start = self._recipe, self._now, self._start
        places = recipe.rollout.workers * self._services.places
        steps = recipe.steps - self._warm_up
        trained, dropped = map(self._ledger.count, (Ledger.TRAINED, Ledger.DROPPED))
        actors = min(scorer.actors for scorer in recipe.scorers)
        return SimulationReport(
            workers=recipe.rollout.workers,
            places=places,
            max_rollouts=recipe.slots * recipe.num_generations,
            max_staleness=recipe.max_staleness,
            steps=recipe.steps,
            warm_up_steps=self._warm_up,
            trained_groups=trained,
            trained_rollouts=int(now.rollouts),
            dropped_groups=dropped,
            unfinished_groups=admitted - trained - dropped,
            num_replaced=replaced,
            wall_s=now.time_s,
            step_s=(now.time_s - start.time_s) / steps,
            generation_s=(now.generated_s - start.generated_s) / places / steps,
            learning_s=(now.learnt_s - start.learnt_s) / steps,
            scoring_s=(trained + dropped) / recipe.steps * self._services.scorer_s / actors,
            group_waits_s=now.waited_s / trained,
            staleness_mean=now.staleness / recipe.steps,
            staleness_max=now.max_staleness,
            driver_cpu_s=cpu_s,
            peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def simulated_prompts(num_tokens: int, domains: Sequence[str] = ("default",)) -> list[Prompt]:
    """Equal but for their names, and their domains in turn.

    Each has a solution, for algorithms that lead with one.
    """
    tokens = np.full(num_tokens, FIRST_TOKEN, np.int32)
    return [
        Prompt(
            id=f"simulated-{number}",
            text="a simulated prompt",
            tokens=tokens,
            reference="a simulated answer",
            solution_tokens=tokens,
            domain=domains[number % len(domains)],
        )
        for number in range(NUM_PROMPTS)
    ]


async def _nothing() -> None:
    """There is nothing to start or to end."""


async def _not_simulated(progress: Progress) -> None:
    """In place of evaluations and checkpoints."""
