"""The records of waiting: one wait, and where the process of an owner runs.

Refuses to know who registers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 5
TAIL_BYTES = 8_000  # a line of a progress bar alone can have thousands
# What Ray writes into a worker's log beside the worker's own lines.
_RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")


def behind_nobody() -> Iterable[str]:
    """The waits inside a wait are all that it depends on."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """The process of an owner."""

    pid: int
    node: str  # address
    logs: tuple[str, ...]  # files on that node with what the process prints

    def tail(self) -> list[str]:
        """The last lines of each log, as far as it is on this machine; indented for a report."""
        found: list[str] = []
        for path in self.logs:
            if lines := _last_lines(Path(path)):
                found += [f"  last lines of {path}:", *[f"    {line}" for line in lines]]
        if not found and self.logs:
            places = ", ".join(self.logs)
            return [f"  process {self.pid} on {self.node} has nothing in its logs here: {places}"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wait:
    """Something that somebody waits for. Times are of the monotonic clock."""

    key: int
    owner: str  # who is waited for
    asked: str  # what it was asked; empty: nothing in particular
    since: float
    deadline: float | None  # None: that of the wait it is a part of, or of those inside it
    part_of: int | None  # key of that wait
    behind: Callable[[], Iterable[str]]  # owners of other waits that it depends on


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:  # another node's file, or one that is gone
        return []
    lines = [line for line in text.splitlines() if line.strip()]
    return list(deque((t for t in lines if not t.startswith(_RAYS_OWN)), maxlen=TAIL_LINES))
