"""RUN/waits.json: who waits for whom, rewritten while a run goes on, for `covey doctor`.

Written by the process of the run and read by any other; a process that stops answering stops
writing it, too. Refuses to know what is wrong with a run (doctor.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from orchestration.stall_report import WaitChains
from orchestration.waiting import Wait, Whereabouts
from orchestration.waits import Waits

WAITS_FILE = "waits.json"
EVERY_S = 2.0
MAX_WAITS = 50  # the oldest: hundreds of workers have thousands


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitRecord:
    """One open wait. Times are of the wall clock."""

    owner: str
    asked: str
    since: float
    deadline: float | None  # None: it ends with the waits inside it
    is_outermost: bool  # a part of no other
    chain: tuple[str, ...]  # owners: who waits for it, then it, then whom it waits for at last
    culprit_asked: str  # of the last in the chain
    culprit_since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitsRecord:
    """The content of waits.json."""

    pid: int
    host: str
    written: float  # wall clock
    step: int  # done so far
    num_waits: int
    waits: tuple[WaitRecord, ...]  # the oldest, then the one whose deadline comes first
    workers: Mapping[str, Whereabouts]  # processes of the owners; an absent one is in `pid`


@asynccontextmanager
async def waits_kept(run: Path, waits: Waits, *, step: Callable[[], int]) -> AsyncIterator[None]:
    """The file is there and fresh while the block runs; it stays if the process dies in it."""
    path = run / WAITS_FILE

    async def keep() -> None:
        """Waits for the clock alone; ended by the end of the block."""
        while True:
            with suppress(OSError):  # a full disk ends the run elsewhere, with its cause
                _replace(path, waits_record(waits, step()))
            await asyncio.sleep(EVERY_S)

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keep(), name="waits.json")
        try:
            yield
        finally:
            keeping.cancel()
            path.unlink(missing_ok=True)


def waits_record(waits: Waits, step: int) -> WaitsRecord:
    """What is open right now."""
    opened = waits.open
    chains = WaitChains(opened)
    offset = time.time() - time.monotonic()
    return WaitsRecord(
        pid=os.getpid(),
        host=socket.gethostname(),
        written=time.time(),
        step=step,
        num_waits=len(opened),
        waits=tuple(_record(wait, chains, offset) for wait in _chosen(opened)),
        workers=dict(waits.whereabouts),
    )


def read_waits(run: Path) -> WaitsRecord | None:
    """None where a run has none: it has ended, or an older version ran it."""
    try:
        text = (run / WAITS_FILE).read_text(encoding="utf-8")
        return TypeAdapter(WaitsRecord).validate_json(text)
    except (OSError, ValidationError):
        return None


def _chosen(opened: list[Wait]) -> list[Wait]:
    timed = [wait for wait in opened[MAX_WAITS:] if wait.deadline is not None]
    return [*opened[:MAX_WAITS], *sorted(timed, key=lambda wait: wait.deadline or 0.0)[:1]]


def _record(wait: Wait, chains: WaitChains, offset: float) -> WaitRecord:
    chain = chains.through(wait.key)
    return WaitRecord(
        owner=wait.owner,
        asked=wait.asked,
        since=wait.since + offset,
        deadline=None if wait.deadline is None else wait.deadline + offset,
        is_outermost=wait.part_of is None,
        chain=tuple(link.owner for link in chain),
        culprit_asked=chain[-1].asked,
        culprit_since=chain[-1].since + offset,
    )


def _replace(path: Path, record: WaitsRecord) -> None:
    """Renamed into place, so that a reader never sees half of it; not worth a flush to disk."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
    draft.replace(path)
