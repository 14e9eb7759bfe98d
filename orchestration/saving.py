"""Saves a run while it trains: one checkpoint at a time, most of it while training goes on.

The loop that trains waits for the copy of the state alone, and for the checkpoint before if that
is still being written. Refuses to know the files (checkpoint.py) and when a save is due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from grpo.engines import Checkpointed, SavedAside
from orchestration.best import BEST_FILE, Evaluations
from orchestration.checkpoint import (
    DriverState,
    begin_checkpoint,
    complete_checkpoint,
    delete_checkpoints,
    mark,
    saved_steps,
    whole_steps,
)
from orchestration.evaluation import EvalReport
from orchestration.recipe import CheckpointConfig
from orchestration.waits import Waits


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What a checkpoint cost."""

    step: int
    blocked_s: float  # training waited
    total_s: float  # until it was in force

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl and the trackers."""
        return {
            "checkpoint/step": float(self.step),
            "checkpoint/blocked_s": self.blocked_s,
            "checkpoint/total_s": self.total_s,
        }


class BoundedSaving:
    """A learner that is saved or loaded within a deadline, under the name of a wait."""

    def __init__(self, learner: SavedAside, waits: Waits, deadline_s: float) -> None:
        self._learner = learner
        self._waits = waits
        self._deadline_s = deadline_s

    async def snapshot(self) -> None:
        """The learner copies its state aside."""
        await self._waits.within(
            self._deadline_s, "learner: copying its state", self._learner.snapshot()
        )

    async def write(self, folder: Path) -> Sequence[str]:
        """The files that the learner wrote."""
        what = f"learner: writing {folder.name}"
        return await self._waits.within(self._deadline_s, what, self._learner.write(folder))

    async def load(self, folder: Path) -> None:
        """The learner goes on from the folder."""
        what = f"learner: loading {folder.name}"
        await self._waits.within(self._deadline_s, what, self._learner.load(folder))


class CheckpointSaver:
    """Owns the checkpoints of a run while it trains."""

    def __init__(
        self,
        run: Path,
        learner: SavedAside,
        config: CheckpointConfig,
        *,
        tasks: asyncio.TaskGroup,
        step: int,
        on_saved: Callable[[CheckpointReport], None],
    ) -> None:
        self.step = step  # of the newest checkpoint, be it whole or under way
        self._run = run
        self._learner = learner
        self._config = config
        self._tasks = tasks
        self._on_saved = on_saved
        self._evaluations = Evaluations(run, step=step)
        self._writing: asyncio.Task[None] | None = None
        self._sorting = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        run: Path,
        learner: SavedAside,
        config: CheckpointConfig,
        *,
        step: int,
        on_saved: Callable[[CheckpointReport], None],
    ) -> AsyncIterator[CheckpointSaver]:
        """The block ends when all is written; a write that fails ends the block with its cause."""
        async with asyncio.TaskGroup() as tasks:
            saver = cls(run, learner, config, tasks=tasks, step=step, on_saved=on_saved)
            try:
                yield saver
            except Exception:  # no cancellation: what was copied is worth writing
                with suppress(Exception):  # the task group has it
                    await saver.finished()
                raise

    async def save(self, state: DriverState, others: Mapping[str, Checkpointed]) -> None:
        """Copy everything aside; it is written while the caller goes on."""
        started = time.monotonic()
        await self.finished()
        self.step = state.step
        draft = await begin_checkpoint(self._run, state.step, self._learner, others)
        blocked_s = time.monotonic() - started
        self._writing = self._tasks.create_task(
            self._write(draft, state, started, blocked_s), name=f"checkpoint {state.step}"
        )

    async def finished(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            await self._writing
            self._writing = None

    def was_evaluated(self, step: int) -> bool:
        """Whether this run has the figures of this step."""
        return step in self._evaluations.steps

    async def evaluated(
        self, step: int, report: EvalReport, save: Callable[[], Awaitable[None]]
    ) -> None:
        """Keep this step if it is among the best so far; `save` makes its checkpoint if needed."""
        await asyncio.to_thread(self._evaluations.record, step, report)
        rivals = {step, *whole_steps(self._run)}
        if step not in self._evaluations.best(rivals, self._config.keep_best):
            return
        if step != self.step:
            await save()
        else:
            await self._sort()

    async def _write(
        self, draft: Path, state: DriverState, started: float, blocked_s: float
    ) -> None:
        await complete_checkpoint(draft, self._learner, state)
        total_s = time.monotonic() - started
        await self._sort()
        self._on_saved(CheckpointReport(step=state.step, blocked_s=blocked_s, total_s=total_s))

    async def _sort(self) -> None:
        """Mark the best and delete what is neither new nor good."""
        async with self._sorting:
            # A checkpoint that comes into force from here on is not in `found`, and stays.
            found, whole = saved_steps(self._run), whole_steps(self._run)
            whole = [step for step in whole if step <= self.step]
            best = self._evaluations.best(whole, self._config.keep_best)
            await asyncio.to_thread(mark, self._run, BEST_FILE, best[0] if best else None)
            doomed = found - {*whole[-self._config.keep :], *best}
            await asyncio.to_thread(delete_checkpoints, self._run, doomed)
