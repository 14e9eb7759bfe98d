"""The driver: schedules groups, training steps and weight sync. Three loops under one TaskGroup.

admit  consumes prompts; waits for a free slot in the buffer; unblocked by a released or dropped
       group. Starts one task per group, which ends in the buffer or is dropped.
train  consumes P finished groups; waits for `buffer.take`; unblocked by finishing groups. Lets the
       learner take a step (training_step.py), brings the weights to the engines, releases P slots.
stop   waits for a request to stop; wakes the other two, so that a checkpoint can be written.

Synchronous training is the staleness bound 0: then P slots exist, and no group is born before the
engines hold the newest weights. Refuses to know Ray, models, files and the name of the algorithm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from grpo.batch import BuiltBatch
from grpo.errors import DeadlineExceeded, Stalled, WeightMismatch
from grpo.types import Prompt, SampleRequest, StepReport
from orchestration.alarms import (
    DropAlarm,
    FailureAlarm,
    LearningAlarm,
    SkipAlarm,
    refuse_stale,
    staleness,
)
from orchestration.buffer import Closed, GroupBuffer, num_slots
from orchestration.group_task import (
    DroppedGroup,
    FinishedGroup,
    GroupRecipe,
    rollout_seed,
    run_group,
)
from orchestration.progress import Progress, Schedule
from orchestration.replay import Replay
from orchestration.training_step import StepLearner, TrainingStep
from orchestration.waits import Waits
from orchestration.weight_sync import fresh_agreement, sync_weights

PROBE_GROUP = -1  # group id of the rollouts that only check the weight sync
PROBE_ROLLOUTS = 4  # together about a hundred tokens: a mean over fewer is noisy in bfloat16
PROBE_TOKENS = 32  # of each at most: the learner waits, and a whole answer may take a minute
DROP_HISTORY_STEPS = 8  # the alarms look at the groups of about this many steps
MAX_SKIPPED_IN_A_ROW = 100_000  # as many prompts as a large data set has


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedStep:
    """Everything a step leaves behind for those who write it down."""

    step: int
    version: int  # the weights it was trained from
    groups: Sequence[FinishedGroup]
    replayed: frozenset[int] = frozenset()  # ids of the groups that earlier steps trained on, too
    built: BuiltBatch
    metrics: Mapping[str, float]


class Journal(Protocol):
    """Who writes down what happens; never decides anything."""

    def trained(self, step: TrainedStep) -> None: ...

    def dropped(self, group: DroppedGroup) -> None: ...


class Driver:
    """Runs the loops from `progress` to the end of the schedule, or to a requested stop."""

    def __init__(
        self,
        *,
        schedule: Schedule,
        common: GroupRecipe,
        learner: StepLearner,
        prompt_at: Callable[[int], Prompt],
        journal: Journal,
        waits: Waits,
        progress: Progress,
        evaluate: Callable[[Progress], Awaitable[None]],
        checkpoint: Callable[[Progress], Awaitable[None]],
        scorer_metrics: Callable[[], Awaitable[Mapping[str, float]]],
    ) -> None:
        """`prompt_at` is a pure function of the group id, so a resumed run sees the same data."""
        self.progress = progress
        # False while the learner may be ahead of `progress`: then it must not be saved.
        self.is_between_steps = True
        self._num_sampled = progress.num_tokens
        self._last_progress = 0.0  # when a group last finished or dropped, monotonic
        self._schedule = schedule
        self._common = common
        self._learner = learner
        self._prompt_at = prompt_at
        self._journal = journal
        self._waits = waits
        self._evaluate = evaluate
        self._checkpoint = checkpoint
        self._scorer_metrics = scorer_metrics
        self._training = TrainingStep(
            schedule=schedule, common=common, learner=learner, waits=waits
        )
        self._replay = Replay(
            count=schedule.replayed_per_step, steps=schedule.replay_steps, seed=common.run_seed
        )
        self._stop = asyncio.Event()
        history = DROP_HISTORY_STEPS * schedule.groups_per_step
        bounds = {name: role.max_failure_rate for name, role in common.scorers.items()}
        self._drops = DropAlarm(history=history, max_rate=schedule.max_dropped_rate)
        self._skips = SkipAlarm(max_in_a_row=MAX_SKIPPED_IN_A_ROW)
        self._learning = LearningAlarm(max_steps=schedule.max_steps_without_signal)
        self._failures = FailureAlarm(
            history=history,
            max_rates={name: bound for name, bound in bounds.items() if bound is not None},
        )
        self._buffer: GroupBuffer[FinishedGroup] = GroupBuffer(
            slots=num_slots(
                schedule.groups_per_step,
                max_staleness=schedule.max_staleness,
                window=schedule.window,
            ),
            window=schedule.window,
            limit=(schedule.steps - progress.step) * schedule.groups_per_step,
            next_group=progress.next_group,
            pending=progress.pending,
        )

    def request_stop(self) -> None:
        """Finish the step in progress and return; what is unfinished will be sampled again."""
        self._stop.set()

    async def run(self) -> bool:
        """Train; True if the schedule is complete, False if a stop was requested before."""
        complete = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._admit(tasks), name="admit")
                tasks.create_task(self._close_on_stop(), name="stop")
                complete = await self._train()
                raise _Finished  # ends the other loops and the groups nobody will take
        except* _Finished:
            pass
        return complete

    async def _close_on_stop(self) -> None:
        await self._stop.wait()
        await self._buffer.close()

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                with self._waits.noted("buffer: a free slot for the next group"):
                    group = await self._buffer.admit()
            except Closed:
                return
            tasks.create_task(self._run_group(group), name=f"group {group}")

    async def _run_group(self, group_id: int) -> None:
        prompt = self._prompt_at(group_id)
        with self._waits.noted(_group_name(group_id)):
            state = self.progress.algorithm_state
            outcome = await run_group(self._common, group_id, prompt, state)
        if isinstance(outcome, DroppedGroup):
            # The slot is freed and the record written without a pause between them: a checkpoint
            # either has the group pending and no record of it, or the record.
            await self._buffer.drop(group_id)
            self._journal.dropped(outcome)
            if outcome.dropped.is_planned:  # no alarm, and no progress: nothing was sampled
                self._skips.observe(outcome.dropped)
                return
        self._last_progress = time.monotonic()
        self._num_sampled += sum(r.num_tokens for r in outcome.group.rollouts)
        self._skips.observe(None)
        self._failures.observe(outcome.group)
        self._drops.observe(outcome)
        if isinstance(outcome, FinishedGroup):
            await self._buffer.finish(group_id, outcome)

    async def _train(self) -> bool:
        schedule = self._schedule
        for step in range(self.progress.step + 1, schedule.steps + 1):
            try:
                started = time.monotonic()
                groups = await self._take()
            except Closed:
                await self._checkpoint(self.progress)
                return False
            self.is_between_steps = False
            await self._step(step, groups, started)
            self.is_between_steps = True
            self._learning.require_signal()
            at_end = step == schedule.steps
            is_evaluated = _due(step, schedule.evaluate_every) and not at_end
            # What runs beside a rollout decides the last digits of its figures: the groups of a
            # synchronous step have the engines for themselves, as after a resume.
            is_alone = is_evaluated and schedule.max_staleness == 0
            if not is_alone:
                await self._buffer.release(len(groups))
            if _due(step, schedule.checkpoint_every) or at_end:
                await self._checkpoint(self.progress)
            if is_evaluated:
                await self._evaluate(self.progress)
            if is_alone:
                await self._buffer.release(len(groups))
        return True

    async def _take(self) -> list[FinishedGroup]:
        """P groups; Stalled when none finishes or drops for the whole deadline."""
        count = self._schedule.groups_per_step
        self._last_progress = time.monotonic()
        while True:
            seen = self._last_progress
            left = seen + self._schedule.take_deadline_s - time.monotonic()
            try:
                return await self._waits.within(
                    left,
                    f"buffer: waiting for {count} finished groups",
                    self._buffer.take(count),
                    behind=lambda: map(_group_name, self._buffer.in_progress),
                )
            except DeadlineExceeded as error:
                if self._last_progress > seen:
                    continue
                groups = ", ".join(map(str, self._buffer.in_progress)) or "none"
                raise Stalled(f"{error}\n  groups in progress: {groups}") from error

    async def _step(self, step: int, fresh: list[FinishedGroup], started: float) -> None:
        """Steps 8 to 12 in the life of a group."""
        timings = {"wait_for_groups": time.monotonic() - started}
        before = self.progress
        refuse_stale(fresh, before.version, self._schedule.max_staleness)
        mixed = self._replay.mixed(step, fresh)
        learnt = await self._training.take(step, mixed, before)
        timings |= learnt.timings_s
        version = before.version + 1
        timings |= await self._synced(version)
        timings |= {f"learner/{phase}": s for phase, s in learnt.report.timings_s.items()}
        gap = await self._checked_gap(step, version, learnt.report)
        scorer_metrics = await self._scorer_metrics()
        # No pause from here to the journal, as above.
        self.progress = Progress(
            step=step,
            version=version,
            next_group=self._buffer.next_group,
            pending=tuple(self._buffer.unfinished),
            algorithm_state=learnt.state,
            num_tokens=self._num_sampled,
            stage_rows=learnt.stage_rows,
        )
        metrics = {**learnt.built.metrics, **learnt.report.metrics, **learnt.metrics, **gap}
        metrics |= staleness(fresh, before.version) | self._replay.metrics(mixed)
        metrics |= scorer_metrics
        timings["step"] = time.monotonic() - started
        metrics |= {f"timing_s/{phase}": seconds for phase, seconds in timings.items()}
        self._learning.observe(learnt.built, metrics)
        num_tokens = sum(r.num_tokens for done in fresh for r in done.group.rollouts)
        metrics["perf/throughput"] = num_tokens / timings["step"]
        self._journal.trained(
            TrainedStep(
                step=step,
                version=before.version,
                groups=learnt.groups,
                replayed=mixed.replayed,
                built=learnt.built,
                metrics=metrics,
            )
        )

    async def _synced(self, version: int) -> dict[str, float]:
        """Bring the learner's weights to the engines; seconds by phase."""
        sync = await self._waits.within(
            self._schedule.sync_deadline_s,
            f"weight sync: version {version}",
            sync_weights(self._learner, self._common.engine, version),
        )
        return {f"sync/{phase}": seconds for phase, seconds in sync.timings_s.items()}

    async def _checked_gap(
        self, step: int, version: int, report: StepReport
    ) -> Mapping[str, float]:
        """How far the engine's and the learner's log-probabilities differ, as metrics.

        The learner compares every token of the step that its own version sampled. Where the
        step has none, because all of it is older, a short fresh rollout is compared instead.
        """
        metrics: Mapping[str, float] = {}
        if report.metrics["log_prob_gap/num_tokens"] > 0:
            gap = report.metrics["log_prob_gap/mean"]
        else:
            found = await self._waits.within(
                self._schedule.sync_deadline_s,
                f"weight check: version {version} with a fresh rollout",
                fresh_agreement(self._learner, self._common.engine, self._probe(step)),
            )
            gap, metrics = found.mean, found.metrics()
        if not gap <= self._schedule.max_log_prob_gap:  # NaN is no agreement
            raise WeightMismatch(
                f"step {step}: rollout engine and learner differ by {gap:.2e} in the "
                f"log-probability of a token, on average; alarms.log_prob_gap allows "
                f"{self._schedule.max_log_prob_gap:g}. In float32 this means that the engine "
                "does not hold the learner's weights; in bfloat16 up to 1e-2 is healthy. "
                "`covey selftest` tells a fault of the weight sync from one of the models"
            )
        return {**metrics, "log_prob_gap": gap}

    def _probe(self, step: int) -> list[SampleRequest]:
        most = min(PROBE_TOKENS, self._common.sampling.max_tokens)
        sampling = replace(self._common.sampling, max_tokens=most)
        return [
            SampleRequest(
                group=PROBE_GROUP,
                index=index,
                context=self._prompt_at(step).tokens,
                guidance=np.zeros(0, np.int32),
                sampling=sampling,
                seed=rollout_seed(self._common.run_seed, PROBE_GROUP, step, index),
            )
            for index in range(PROBE_ROLLOUTS)
        ]


class _Finished(Exception):
    """The training loop has returned."""


def _group_name(group: int) -> str:
    return f"group {group}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
