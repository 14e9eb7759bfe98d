"""What stops a run that has stopped making sense: stale groups, a flood of drops.

Pure bookkeeping over finished groups; refuses to know the loops that feed it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from grpo.errors import Fatal
from orchestration.group_task import DroppedGroup, FinishedGroup


class DropAlarm:
    """Ends a run that drops nearly every group: it would sample for ever and learn nothing."""

    def __init__(self, *, history: int, max_rate: float) -> None:
        self._recent: deque[str | None] = deque(maxlen=history)  # reason; None: not dropped
        self._max_rate = max_rate

    def finished(self) -> None:
        """A group survived."""
        self._recent.append(None)

    def dropped(self, group: DroppedGroup) -> None:
        """Count a dropped group; Fatal if too many of the recent ones were."""
        self._recent.append(group.dropped.reason)
        reasons = Counter(reason for reason in self._recent if reason is not None)
        rate = reasons.total() / len(self._recent)
        if len(self._recent) == self._recent.maxlen and rate > self._max_rate:
            reason, count = reasons.most_common(1)[0]
            raise Fatal(
                f"{reasons.total()} of the last {len(self._recent)} groups were dropped, "
                f"{count} of them for {reason!r} (last: {group.dropped.detail or 'no detail'}); "
                f"alarms.dropped_rate allows a share of {self._max_rate:g}"
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
