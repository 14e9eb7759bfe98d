"""One driver with fakes around it, for the tests of its loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from grpo.algorithms import ALGORITHMS
from grpo.pipeline import Pipeline
from grpo.types import Sampling
from orchestration.driver import Driver
from orchestration.group_task import GroupRecipe, ScorerRole
from orchestration.progress import Progress, Schedule
from orchestration.rollout_pool import RolloutPool
from orchestration.waits import Waits
from tests.fakes import FakeEngine, FakeJournal, FakeLearner, FakeScorer, FakeTokenizer, a_prompt

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8)


def a_schedule(**changes: object) -> Schedule:
    schedule = Schedule(
        steps=4,
        groups_per_step=3,
        updates_per_step=1,
        max_staleness=0,
        window=1,
        checkpoint_every=0,
        evaluate_every=0,
        max_log_prob_gap=1e-3,
        max_dropped_rate=0.9,
        max_steps_without_signal=100,
        take_deadline_s=5.0,
        train_deadline_s=5.0,
        sync_deadline_s=5.0,
    )
    return replace(schedule, **changes)  # type: ignore[arg-type]  # test shorthand


def a_pipeline(name: str = "grpo") -> Pipeline:
    algorithm = ALGORITHMS[name]
    config = algorithm.config(num_generations=4)
    return algorithm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=8)


class Setting:
    """One driver with fakes around it."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        algorithm: str = "grpo",
        pipeline: Pipeline | None = None,
        progress: Progress | None = None,
        scorer: FakeScorer | None = None,
        stop_on_failure: bool = False,
        max_failure_rate: float | None = None,
        engine: FakeEngine | None = None,
        learner: FakeLearner | None = None,
        pool: RolloutPool | None = None,
        waits: Waits | None = None,
    ) -> None:
        progress = progress or Progress()
        scorer = scorer or FakeScorer()
        role = ScorerRole(
            scorer=scorer,
            stop_on_failure=stop_on_failure,
            max_failure_rate=max_failure_rate,
            learning=scorer if scorer.learns else None,
        )
        self.engine = engine or FakeEngine(version=progress.version)
        self.learner = learner or FakeLearner(version=progress.version)
        self.journal = FakeJournal()
        self.checkpoints: list[Progress] = []
        self.in_progress_at_evaluation: list[list[int]] = []
        self.after_checkpoint: Callable[[Progress], None] = lambda progress: None
        self.driver = Driver(
            schedule=schedule,
            common=GroupRecipe(
                pipeline=pipeline or a_pipeline(algorithm),
                sampling=SAMPLING,
                run_seed=7,
                engine=pool or self.engine,
                tokenizer=FakeTokenizer(),
                scorers={"answer": role},
            ),
            learner=self.learner,
            prompt_at=a_prompt,
            journal=self.journal,
            waits=waits or Waits(),
            progress=progress,
            evaluate=self._evaluate,
            checkpoint=self._checkpoint,
            scorer_metrics=self._scorer_metrics,
        )

    def run(self) -> bool:
        return asyncio.run(self.driver.run())

    async def _scorer_metrics(self) -> dict[str, float]:
        return {"scorers/answer/hit_rate": 0.25}

    async def _evaluate(self, progress: Progress) -> None:
        await asyncio.sleep(0)  # groups that may be admitted are
        self.in_progress_at_evaluation.append(list(self.driver._buffer.in_progress))

    async def _checkpoint(self, progress: Progress) -> None:
        self.checkpoints.append(progress)
        self.after_checkpoint(progress)


def root(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
