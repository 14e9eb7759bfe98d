"""What happens to the groups of a step between the buffer and the weight sync.

    measure  the learner says what the algorithm wants to know of each rollout
    build    rewards, advantages and coefficients: grpo/batch.py
    train    the learner's optimiser moves; the algorithm's own state with it
    stage    rows are put by, and now and then they are trained on, too
    scorers  those that learn see the groups

Refuses to know the loops, the buffer, weights on their way and files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from grpo.batch import BuiltBatch, build_batch
from grpo.engines import Measuring, PolicyLearner
from grpo.pipeline import RewardedGroup, State
from grpo.types import Group, StepReport, TrainRow
from orchestration.group_task import FinishedGroup, GroupRecipe
from orchestration.measuring import measured_groups
from orchestration.progress import Progress, Schedule
from orchestration.replay import StepGroups
from orchestration.stage import left_rows, stage_batch
from orchestration.waits import Waits


class StepLearner(PolicyLearner, Measuring, Protocol):
    """A learner as the driver needs it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearntStep:
    """What a step leaves behind before its weights are published."""

    groups: tuple[FinishedGroup, ...]  # with what was measured of them
    built: BuiltBatch
    report: StepReport
    state: State  # of the algorithm, for the groups that begin from now on
    stage_rows: tuple[TrainRow, ...]
    metrics: Mapping[str, float]
    timings_s: Mapping[str, float]


class TrainingStep:
    """Takes one step after the other with the same learner and scorers."""

    def __init__(
        self, *, schedule: Schedule, common: GroupRecipe, learner: StepLearner, waits: Waits
    ) -> None:
        self._schedule = schedule
        self._common = common
        self._pipeline = common.pipeline
        self._learner = learner
        self._waits = waits

    async def take(self, step: int, groups: StepGroups, progress: Progress) -> LearntStep:
        """Train on the groups; nothing has happened to the engines yet."""
        timings: dict[str, float] = {}
        state = progress.algorithm_state
        measured = await self._measured(step, groups, state, timings)
        with _timed(timings, "build_batch"):
            built = build_batch(
                self._pipeline,
                measured,
                state,
                step=step,
                version=progress.version,
                num_updates=self._schedule.updates_per_step,
                num_epochs=self._schedule.epochs_per_step,
            )
        with _timed(timings, "train"):
            report = await self._waits.within(
                self._schedule.train_deadline_s,
                f"learner: step {step}",
                self._learner.train(built.batch),
            )
        # What an earlier step has seen already moves no state again.
        new = [item for item in built.rewarded if item.group.id not in groups.replayed]
        stage_rows, metrics = await self._staged(step, new, progress, timings)
        metrics |= await self._taught(step, new, timings)
        return LearntStep(
            groups=tuple(
                replace(done, group=group)
                for done, group in zip(groups.groups, measured, strict=True)
            ),
            built=built,
            report=report,
            state=self._pipeline.adapt(state, new, report),
            stage_rows=stage_rows,
            metrics=metrics,
            timings_s=timings,
        )

    async def _measured(
        self, step: int, mixed: StepGroups, state: State, timings: dict[str, float]
    ) -> list[Group]:
        groups = [done.group for done in mixed.groups]
        if not self._pipeline.measures:
            return groups
        with _timed(timings, "measure"):
            return await self._waits.within(
                self._schedule.train_deadline_s,
                f"learner: measuring the groups of step {step}",
                measured_groups(self._pipeline, self._learner, groups, state),
            )

    async def _staged(
        self, step: int, new: list[RewardedGroup], progress: Progress, timings: dict[str, float]
    ) -> tuple[tuple[TrainRow, ...], dict[str, float]]:
        """The rows that wait for their stage, and what it said if this was the time for it."""
        stage = self._pipeline.stage
        if stage is None:
            return (), {}
        rows = progress.stage_rows + left_rows(stage, new, progress.algorithm_state)
        if step % stage.every:
            return rows, {"stage/num_rows_waiting": float(len(rows))}
        # The learner has moved on from `progress.version`, and its weights have no number yet.
        batch = stage_batch(stage, rows, step=step, version=progress.version + 1)
        if batch is None:
            return (), {"stage/num_rows": 0.0}
        with _timed(timings, "stage"):
            report = await self._waits.within(
                self._schedule.train_deadline_s,
                f"learner: stage of step {step}",
                self._learner.train(batch),
            )
        metrics = {f"stage/{name}": value for name, value in report.metrics.items()}
        return (), metrics | {"stage/num_rows": float(len(rows))}

    async def _taught(
        self, step: int, new: list[RewardedGroup], timings: dict[str, float]
    ) -> dict[str, float]:
        """What the scorers that learn said of the step's groups."""
        learning = {n: role.learning for n, role in self._common.scorers.items() if role.learning}
        if not learning:
            return {}
        groups = [item.group for item in new]
        with _timed(timings, "scorers_learn"):
            found = await asyncio.gather(
                *[
                    self._waits.within(
                        self._schedule.train_deadline_s,
                        f"scorer {name}: learning from step {step}",
                        scorer.learn(groups),
                    )
                    for name, scorer in learning.items()
                ]
            )
        return {
            f"scorers/{name}/{metric}": value
            for name, metrics in zip(learning, found, strict=True)
            for metric, value in metrics.items()
        }


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    timings[phase] = time.monotonic() - started
