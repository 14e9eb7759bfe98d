"""What stops a run that has stopped making sense: stale groups, a flood of drops or failures.

Pure bookkeeping over finished groups; refuses to know the loops that feed it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.batch import BuiltBatch
from grpo.errors import Fatal
from grpo.types import Dropped, Group
from orchestration.group_task import DroppedGroup, FinishedGroup


class DropAlarm:
    """Ends a run that drops nearly every group: it would sample for ever and learn nothing."""

    def __init__(self, *, history: int, max_rate: float) -> None:
        self._recent: deque[str | None] = deque(maxlen=history)  # reason; None: not dropped
        self._max_rate = max_rate

    def observe(self, outcome: FinishedGroup | DroppedGroup) -> None:
        """Count a group that survived or was dropped; Fatal if too many of the recent ones were."""
        if isinstance(outcome, FinishedGroup):
            self._recent.append(None)
            return
        self._recent.append(outcome.dropped.reason)
        reasons = Counter(reason for reason in self._recent if reason is not None)
        rate = reasons.total() / len(self._recent)
        if len(self._recent) == self._recent.maxlen and rate > self._max_rate:
            reason, count = reasons.most_common(1)[0]
            raise Fatal(
                f"{reasons.total()} of the last {len(self._recent)} groups were dropped, "
                f"{count} of them for {reason!r} (last: {outcome.dropped.detail or 'no detail'}); "
                f"alarms.dropped_rate allows a share of {self._max_rate:g}"
            )


class FailureAlarm:
    """Ends a run in which a scorer fails more groups than its recipe allows."""

    def __init__(self, *, history: int, max_rates: Mapping[str, float]) -> None:
        """`max_rates` by scorer, of the last `history` groups that each has judged."""
        self._max_rates = max_rates
        # Of each group: what the scorer's first failure was; None: it answered.
        self._recent: dict[str, deque[str | None]] = {
            name: deque(maxlen=history) for name in max_rates
        }

    def observe(self, group: Group) -> None:
        """Count what became of the group's scores; Fatal if a scorer's bound is passed."""
        for name, recent in self._recent.items():
            failures = [score.failure for score in group.scores if score.scorer == name]
            if failures:
                recent.append(next((text for text in failures if text is not None), None))
                self._require_healthy(name, recent)

    def _require_healthy(self, name: str, recent: deque[str | None]) -> None:
        reasons = Counter(text for text in recent if text is not None)
        rate, bound = reasons.total() / len(recent), self._max_rates[name]
        if len(recent) == recent.maxlen and rate > bound:
            reason, count = reasons.most_common(1)[0]
            raise Fatal(
                f"scorer {name!r} failed {reasons.total()} of the last {len(recent)} groups, a "
                f"share of {rate:.2g}, and its max_failure_rate is {bound:g}; the commonest "
                f"reason, {count} times: {reason}. Mend the scorer and resume from the last "
                "checkpoint, or raise max_failure_rate"
            )


class LearningAlarm:
    """Ends a run that goes on sampling, but whose steps have nothing to learn from any more.

    A step teaches nothing if all its groups were rewarded alike and no advantage is other than 0.
    That every completion was cut off is the cause, where it is so, and no stop of its own: a run
    of fixed length still learns.
    """

    def __init__(self, *, max_steps: int) -> None:
        self._max_steps = max_steps
        self._in_a_row = 0
        self._is_cut_off = False
        self._reward = 0.0

    def observe(self, built: BuiltBatch, metrics: Mapping[str, float]) -> None:
        """Count a step that was trained on."""
        self._in_a_row = 0 if _teaches(built, metrics) else self._in_a_row + 1
        self._is_cut_off = metrics["completions/clipped_ratio"] == 1.0
        self._reward = metrics.get("reward", math.nan)  # absent where no rollout has one

    def require_signal(self) -> None:
        """Fatal after too many steps in a row that taught nothing."""
        if self._in_a_row < self._max_steps:
            return
        if self._is_cut_off:
            cause = (
                "every completion was cut off by its budget: raise sampling.max_completion_length, "
                "and see that the model ends its answers (chat template, end-of-text token)"
            )
        else:
            cause = (
                "the prompts are too easy or too hard for this model, or the scorer gives the same "
                "score to everything: look at the answers in groups.jsonl, change the data, raise "
                "sampling.temperature or the rollouts of a group"
            )
        raise Fatal(
            f"the last {self._in_a_row} steps taught nothing: in each of them all rewards of a "
            f"group were equal (mean of the last one: {self._reward:.3g}). Probably {cause}. "
            f"alarms.steps_without_signal is {self._max_steps}"
        )


def _teaches(built: BuiltBatch, metrics: Mapping[str, float]) -> bool:
    return metrics["frac_reward_zero_std"] < 1.0 or any(
        bool(np.any(row.advantages * row.weights * row.policy_weights))
        for update in built.batch.updates
        for row in update
    )


class SkipAlarm:
    """Ends a run whose algorithm skips prompt after prompt: there is nothing left to train on."""

    def __init__(self, *, max_in_a_row: int) -> None:
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def observe(self, skipped: Dropped | None) -> None:
        """Count a prompt that was skipped, or None for one that was not."""
        self._in_a_row = 0 if skipped is None else self._in_a_row + 1
        if skipped is not None and self._in_a_row >= self._max_in_a_row:
            raise Fatal(
                f"{self._in_a_row} prompts in a row were skipped, the last one for "
                f"{skipped.reason!r}: the algorithm finds nothing left to learn from in this data; "
                "end the run here, add harder prompts, or turn the skipping off"
            )


def ages(groups: Sequence[FinishedGroup], version: int) -> list[int]:
    """How many versions old the oldest sampled token of each group is."""
    oldest = [
        min(int(r.versions[r.versions >= 0].min(initial=version)) for r in done.group.rollouts)
        for done in groups
    ]
    return [version - born for born in oldest]


def staleness(groups: Sequence[FinishedGroup], version: int) -> dict[str, float]:
    """The ages as metrics."""
    values = ages(groups, version)
    return {"staleness/mean": float(np.mean(values)), "staleness/max": float(max(values))}


def refuse_stale(groups: Sequence[FinishedGroup], version: int, bound: int) -> None:
    """The buffer keeps every age within the bound; if not, its accounting is broken."""
    for done, age in zip(groups, ages(groups, version), strict=True):
        if age > bound:
            raise Fatal(
                f"group {done.group.id} is {age} versions old, the bound is {bound}: "
                "the buffer's accounting is broken"
            )
