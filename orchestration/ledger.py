"""The ledger of a run: every admitted group is trained on once, dropped for a reason, or pending.

Reads groups.jsonl and the newest checkpoint; says in plain words what contradicts that. Refuses to
know how groups come about and what a run was to learn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic_core import from_json

from orchestration.checkpoint import DriverState

MAX_NAMED = 5  # ids in one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the ledger needs of a line of groups.jsonl."""

    step: int
    group: int
    prompt: str  # id
    dropped: str | None = None  # reason; None: trained on
    is_replayed: bool = False  # trained on once more


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """How many groups went where, and what is wrong with that; nothing: every group once."""

    num_trained: int
    num_dropped: int
    num_pending: int
    num_replayed: int
    problems: tuple[str, ...]

    def line(self) -> str:
        """One line for people."""
        counts = (
            f"{self.num_trained} groups trained on, {self.num_dropped} dropped, "
            f"{self.num_pending} pending, {self.num_replayed} replayed"
        )
        if self.problems:
            return f"ledger: {counts}; WRONG: {'; '.join(self.problems)}"
        return f"ledger: {counts}; none lost, none twice, in the planned order"


class DamagedRecord(Exception):
    """A line that covey has not written so."""


def read_entries(file: Path) -> Iterator[Entry]:
    """The lines of groups.jsonl; a last line without an end was being written."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    record = from_json(line)
                except ValueError as error:
                    raise DamagedRecord(f"line {number} of {file.name}: {error}") from error
                yield Entry(
                    step=record["step"],
                    group=record["group"],
                    prompt=record["prompt"]["id"],
                    dropped=record.get("dropped"),
                    is_replayed=record.get("replayed", False),
                )


def audited(
    entries: Iterable[Entry],
    saved: DriverState | None,
    *,
    window: int,
    planned: Callable[[int], str] | None,
) -> Ledger:
    """Compare what was written down with what was admitted.

    `saved`: of the newest checkpoint; without one nothing says which groups were admitted.
    `planned`: the id of the prompt that a group was to have; None: not known.
    """
    entries = list(entries)
    trained = [item for item in entries if item.dropped is None and not item.is_replayed]
    dropped = [item for item in entries if item.dropped is not None]
    replayed = [item for item in entries if item.is_replayed]
    problems = [
        *_twice(trained, dropped),
        *_strange_replays(replayed, trained),
        *_missing_steps(trained),
        *_out_of_order(trained, window),
        *([] if saved is None else _lost(entries, saved)),
        *([] if planned is None else _other_prompts(entries, planned)),
    ]
    return Ledger(
        num_trained=len(trained),
        num_dropped=len(dropped),
        num_pending=0 if saved is None else len(saved.pending),
        num_replayed=len(replayed),
        problems=tuple(problems),
    )


def _twice(trained: Sequence[Entry], dropped: Sequence[Entry]) -> Iterator[str]:
    times = Counter(item.group for item in (*trained, *dropped))
    is_trained = {item.group for item in trained}
    more = [group for group, count in times.items() if count > 1]
    if ended := [group for group in more if group in is_trained]:
        yield f"trained on twice, or dropped as well: {_named(ended)}"
    if ended := [group for group in more if group not in is_trained]:
        yield f"dropped twice: {_named(ended)}"


def _strange_replays(replayed: Sequence[Entry], trained: Sequence[Entry]) -> Iterator[str]:
    step_of = {item.group: item.step for item in trained}
    never = [g.group for g in replayed if g.group not in step_of or step_of[g.group] >= g.step]
    if never:
        yield f"replayed before any step had trained on them: {_named(never)}"


def _missing_steps(trained: Sequence[Entry]) -> Iterator[str]:
    steps = {item.step for item in trained}
    missing = sorted(set(range(1, max(steps, default=0))) - steps)
    if missing:
        yield f"steps without a group: {_named(missing)}"


def _out_of_order(trained: Sequence[Entry], window: int) -> Iterator[str]:
    """With a window of 1 no group is trained on after a younger one of an earlier step.

    A wider window lets younger ones pass, and begins to count anew after a resume.
    """
    if window > 1:
        return
    late: list[int] = []
    newest = -1  # of the steps before
    for _, items in groupby(sorted(trained, key=_step), key=_step):
        groups = [item.group for item in items]
        late += [group for group in groups if group < newest]
        newest = max(newest, *groups)
    if late:
        yield f"trained on after younger groups: {_named(late)}"


def _lost(entries: Sequence[Entry], saved: DriverState) -> Iterator[str]:
    """Against the checkpoint; later lines are of steps that a resumed run does again."""
    done = {item.group for item in entries if item.step <= saved.step}
    pending = set(saved.pending)
    if lost := sorted(set(range(saved.next_group)) - done - pending):
        yield f"lost (neither trained on, nor dropped, nor pending): {_named(lost)}"
    if again := sorted(done & pending):
        yield f"done, and pending in the checkpoint of step {saved.step}: {_named(again)}"


def _other_prompts(entries: Sequence[Entry], planned: Callable[[int], str]) -> Iterator[str]:
    others = [item.group for item in entries if item.prompt != planned(item.group)]
    if others:
        yield f"with another prompt than planned: {_named(sorted(set(others)))}"


def _step(entry: Entry) -> int:
    return entry.step


def _named(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:MAX_NAMED]))
    return f"{shown} and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else shown
