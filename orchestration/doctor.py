"""What is going on in a run and what is wrong with it, from its folder alone.

Works while the run goes on, after its end and after a crash; a run of a version that wrote no
waits.json is told by its lock. Refuses to know how the answer is shown.
"""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ValidationError

from grpo.errors import UserError
from orchestration.checkpoint import read_driver_state
from orchestration.config import Recipe
from orchestration.health import missing_steps, signs_of_trouble, steps_of
from orchestration.ledger import DamagedRecord, Ledger, audited, read_entries
from orchestration.metrics_file import read_lines
from orchestration.resume import require_same_data, whole_checkpoints
from orchestration.run_directory import (
    GROUPS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    RunStatus,
)
from orchestration.scaling import in_words, pools_in_words, read_pools
from orchestration.waits_file import EVERY_S, WaitRecord, WaitsRecord, read_waits

SILENT_S = 15 * EVERY_S  # the process is stopped, or too busy for anything else
NEAR_DEADLINE = 0.8  # of the time that a wait has


class RunState(StrEnum):
    """What has become of a run."""

    RUNNING = "running"
    CRASHED = "crashed"  # its process is gone and left no summary
    FINISHED = RunStatus.FINISHED.value
    INTERRUPTED = RunStatus.INTERRUPTED.value
    FAILED = RunStatus.FAILED.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The answer of `covey doctor`."""

    run: str
    state: RunState
    step: int
    planned_steps: int
    last_line_s: float | None  # seconds since a step or a dropped group was written down
    waits: tuple[str, ...] = ()  # who waits for whom, oldest first; of a crashed run: as it was
    closest: str | None = None  # the wait whose deadline comes first
    pools: str | None = None  # how large they are, of a run that goes on
    ledger: Ledger | None = None  # of an ended run
    remarks: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def is_healthy(self) -> bool:
        return not self.problems


class _Summary(BaseModel):
    """What matters here of summary.json."""

    status: RunStatus
    cause: str | None = None


def diagnosed(run: Path, recipe: Recipe, *, now: float | None = None) -> Diagnosis:
    """Look at a run folder; writes nothing."""
    now = time.time() if now is None else now
    waits = read_waits(run)
    summary = _summary(run)
    state = _state(run, summary, waits, now)
    damage = list[str]()
    # A run that has just begun has none.
    lines = read_lines(run, damage.append) if (run / METRICS_FILE).exists() else []
    steps = steps_of(lines)
    closest = None if waits is None else _closest(waits)
    # What a process that is gone wrote last is told as of then.
    seen = waits.written if waits is not None and state is RunState.CRASHED else now
    pools, remarks = read_pools(run), list[str]()
    ledger = None
    if state is not RunState.RUNNING:
        try:
            ledger = _ledger(run, recipe, remarks.append)
        except DamagedRecord as error:
            damage.append(f"groups.jsonl was changed or damaged, so there is no ledger: {error}")
        damage += missing_steps(steps)
        if pools is not None and pools.asked and state is not RunState.FINISHED:
            remarks.append(f"--resume begins with {in_words(pools.asked)}, as covey scale asked")
    problems = [
        *_how_it_ended(run, state, summary),
        *(_waiting(waits, now) if waits is not None and state is RunState.RUNNING else ()),
        *signs_of_trouble(steps, recipe),
        *(ledger.problems if ledger is not None else ()),
        *damage,
    ]
    return Diagnosis(
        run=str(run),
        state=state,
        step=int(steps[-1]["step"] or 0) if steps else 0,
        planned_steps=recipe.steps,
        last_line_s=_last_line_s(run, now),
        waits=() if waits is None else tuple(_in_words(wait, seen) for wait in _told(waits)),
        closest=None if closest is None else _in_words(closest, seen),
        pools=None
        if pools is None or state is not RunState.RUNNING
        else pools_in_words(pools.pools),
        ledger=ledger,
        remarks=tuple(remarks),
        problems=tuple(problems),
    )


def state_of(run: Path) -> RunState:
    """What has become of the run, without looking further."""
    return _state(run, _summary(run), read_waits(run), time.time())


def _summary(run: Path) -> _Summary | None:
    try:
        return _Summary.model_validate_json((run / SUMMARY_FILE).read_bytes())
    except OSError:
        return None
    except ValidationError:
        return _Summary(
            status=RunStatus.FAILED, cause=f"nobody knows how, as {SUMMARY_FILE} is damaged"
        )


def _state(run: Path, summary: _Summary | None, waits: WaitsRecord | None, now: float) -> RunState:
    if summary is not None:
        return RunState(summary.status)
    is_elsewhere = waits is not None and waits.host != socket.gethostname()
    if is_elsewhere and waits is not None and now - waits.written < SILENT_S:
        return RunState.RUNNING  # locks do not reach across every file system
    return RunState.RUNNING if _is_locked(run) else RunState.CRASHED


def _is_locked(run: Path) -> bool:
    """Whether a process holds the run; asks for a moment with a lock that readers can share."""
    try:
        with (run / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def _how_it_ended(run: Path, state: RunState, summary: _Summary | None) -> Iterator[str]:
    if state is RunState.FAILED and summary is not None:
        yield f"the run failed: {summary.cause}"
    elif state is RunState.CRASHED:
        saved = max(whole_checkpoints(run), default=None)
        remedy = (
            f"`covey train RECIPE --resume {run}` continues from step {saved}"
            if saved is not None
            else f"it had no checkpoint yet: `covey train RECIPE --resume {run}` begins it again"
        )
        yield (
            "the process of the run is gone and left no summary: it was killed (out of memory? "
            f"see the kernel's log), or the machine went down; {remedy}"
        )


def _waiting(waits: WaitsRecord, now: float) -> Iterator[str]:
    silent_s = now - waits.written
    if silent_s > SILENT_S:
        yield (
            f"the process of the run (pid {waits.pid} on {waits.host}) has not written "
            f"its waits for {silent_s:.0f} s: it is stopped, or stuck outside of its loops"
        )
    closest = _closest(waits)
    if closest is None or closest.deadline is None:
        return
    if now - closest.since < NEAR_DEADLINE * (closest.deadline - closest.since):
        return
    culprit = closest.chain[-1]
    place = waits.workers.get(culprit)
    where = f" (pid {place.pid} on {place.node}, log {place.logs[-1]})" if place else ""
    yield (
        f"{culprit}{where} keeps the run waiting: {_in_words(closest, now)}; when the deadline "
        "passes, a rollout worker or scorer is replaced, anything else ends the run"
    )


def _closest(waits: WaitsRecord) -> WaitRecord | None:
    """The wait whose deadline comes first. That of the buffer begins anew with every group."""
    timed = [wait for wait in waits.waits if wait.deadline is not None and wait.owner != "buffer"]
    return min(timed, key=lambda wait: wait.deadline or 0.0, default=None)


def _told(waits: WaitsRecord) -> list[WaitRecord]:
    """The outermost waits, of those that end with the same culprit the oldest."""
    told: list[WaitRecord] = []
    named: set[str] = set()
    for wait in waits.waits:
        if wait.is_outermost and wait.chain[-1] not in named:
            told.append(wait)
            named.update(wait.chain)
    return told


def _in_words(wait: WaitRecord, now: float) -> str:
    """`the run -> buffer -> group 3 -> rollout worker 1 (what it was asked), since 3 s`."""
    text = " -> ".join(["the run", *wait.chain])
    if wait.culprit_asked:
        text += f" ({wait.culprit_asked})"
    text += f", since {now - wait.culprit_since:.0f} s"
    if wait.deadline is not None:
        text += f"; deadline of {wait.owner} in {wait.deadline - now:.0f} s"
    return text


def _last_line_s(run: Path, now: float) -> float | None:
    files = [run / name for name in (METRICS_FILE, GROUPS_FILE)]
    written = [file.stat().st_mtime for file in files if file.exists() and file.stat().st_size]
    return now - max(written) if written else None


def _ledger(run: Path, recipe: Recipe, remark: Callable[[str], None]) -> Ledger | None:
    if not (run / GROUPS_FILE).exists():
        return None
    # Imported here: a tokenizer takes seconds to load, and a run that goes on needs none.
    from orchestration.run_inputs import planned_order
    from rollout_workers.tokenization import Tokenization

    whole, order = whole_checkpoints(run), None
    saved = read_driver_state(whole[max(whole)]) if whole else None
    try:
        found = planned_order(recipe, Tokenization(recipe.model))
        if saved is not None:
            require_same_data(saved.prompts, found.record)
        order = found
    except (UserError, OSError) as error:
        remark(f"the order of the prompts was not compared with the data: {error}")
    if saved is None:
        remark("no checkpoint says which groups were admitted, so none can be missed")
    try:
        return audited(
            read_entries(run / GROUPS_FILE),
            saved,
            window=recipe.window,
            planned=None if order is None else lambda group: order.at(group).id,
        )
    except KeyError as error:
        remark(f"groups.jsonl is not of this version, so there is no ledger: {error!r}")
        return None
