"""Writes down what the driver reports: records, metrics, display and the counters of a run.

Decides nothing. Refuses to know how files, trackers and the screen work.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial

from grpo.pipeline import Pipeline, Reward
from grpo.types import TrainRow
from orchestration.data_metrics import DataMetrics
from orchestration.display import Display
from orchestration.driver import TrainedStep
from orchestration.group_task import DroppedGroup
from orchestration.records import dropped_record, trained_record
from orchestration.run_directory import RunDirectory
from orchestration.telemetry import PhaseClock, Telemetry, idle_shares


class RunJournal:
    """The driver's Journal for a run folder."""

    def __init__(
        self,
        *,
        run: RunDirectory,
        telemetry: Telemetry,
        display: Display,
        clock: PhaseClock,
        pipeline: Pipeline,
        data: DataMetrics,
        total_steps: int,
    ) -> None:
        self.dropped_by_reason: Counter[str] = Counter()
        self.skipped_by_reason: Counter[str] = Counter()  # on purpose, before anything was sampled
        self._run = run
        self._telemetry = telemetry
        self._display = display
        self._clock = clock
        self._terms = [_name(reward) for reward in pipeline.rewards]
        self._data = data
        self._total_steps = total_steps
        self.step = 0  # the last one that was written down
        if data.remark is not None:
            display.message(data.remark)
        self._dropped_in_step: Counter[str] = Counter()
        self._skipped_in_step: Counter[str] = Counter()

    def turn_back(
        self, step: int, *, dropped: Mapping[str, int], skipped: Mapping[str, int]
    ) -> None:
        """Go on after `step`, with what had been counted until then."""
        self.step = step
        self.dropped_by_reason = Counter(dropped)
        self.skipped_by_reason = Counter(skipped)
        self._dropped_in_step, self._skipped_in_step = Counter(), Counter()
        self._data.forget()

    def trained(self, step: TrainedStep) -> None:
        """A step is done and its weights are with the engines."""
        now = time.time()
        rows_of: dict[int, list[TrainRow]] = defaultdict(list)
        for row in (row for update in step.built.batch.updates for row in update):
            rows_of[row.group].append(row)
        times = {done.group.id: done.times for done in step.groups}
        for rewarded in step.built.rewarded:
            record = trained_record(
                rewarded,
                rows_of[rewarded.group.id],
                terms=self._terms,
                times=times[rewarded.group.id],
                trained=now,
                is_replayed=rewarded.group.id in step.replayed,
            )
            self._run.append_group(step.step, record)
        metrics = {**step.metrics, **idle_shares(step.metrics, self._clock.lap())}
        metrics |= _counts("dropped", self._dropped_in_step)
        metrics["dropped"] = float(self._dropped_in_step.total())
        metrics |= _counts("skipped", self._skipped_in_step)
        metrics |= self._data.of_step(step)
        self._dropped_in_step, self._skipped_in_step = Counter(), Counter()
        self.step = step.step
        self._telemetry.log(step.step, metrics)
        self._display.step(metrics, step.step, self._total_steps)

    def dropped(self, group: DroppedGroup) -> None:
        """A group fell out while the next step was being filled, or was never begun."""
        reason, domain = group.dropped.reason, group.group.prompt.domain
        self._data.fell_out(domain, "skipped" if group.dropped.is_planned else "dropped")
        if group.dropped.is_planned:
            self.skipped_by_reason[reason] += 1
            self._skipped_in_step[reason] += 1
        else:
            self.dropped_by_reason[reason] += 1
            self._dropped_in_step[reason] += 1
        self._run.append_group(self.step + 1, dropped_record(group))


def _counts(name: str, reasons: Counter[str]) -> dict[str, float]:
    return {f"{name}/{reason}": float(count) for reason, count in reasons.items()}


def _name(reward: Reward) -> str:
    """A scorer's term is called as the scorer, any other as its function."""
    if not isinstance(reward, partial):
        return reward.__name__
    scorer = reward.keywords.get("scorer")
    return scorer if isinstance(scorer, str) else reward.func.__name__
