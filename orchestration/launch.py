"""One training run from a recipe to its summary: open the folder, start the roles, train.

Knows the order of things; refuses to know how any of them works.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from grpo.errors import Fatal, UserError, root_cause
from orchestration.checkpoint import latest_checkpoint
from orchestration.config import Recipe
from orchestration.display import Display
from orchestration.live_pools import pools_kept
from orchestration.roles import local_recipe, started_roles
from orchestration.run_directory import RunStatus
from orchestration.run_inputs import RunInputs, read_inputs
from orchestration.run_records import RunRecords, opened_records
from orchestration.scaling import at_asked_sizes
from orchestration.stops import StopSignals
from orchestration.training import Training
from orchestration.waits import Waits
from orchestration.waits_file import waits_kept


def train(recipe: Recipe, *, local: bool, resume: Path | None) -> int:
    """Run the recipe; the exit status is 0 only if its schedule was completed."""
    recipe = local_recipe(recipe) if local else recipe
    inputs = read_inputs(recipe, None if resume is None else str(resume))
    with Display.open() as display:
        return asyncio.run(_Run(inputs, display, local=local).train())


class _Run:
    """One run in this process: what it needs, and what is left of it."""

    def __init__(self, inputs: RunInputs, display: Display, *, local: bool) -> None:
        self._inputs = inputs
        self._display = display
        self._local = local
        self._waits = Waits(on_trouble=display.message)
        self._stops = StopSignals(display.message)

    async def train(self) -> int:
        """Open the run folder, train, and leave a summary whatever happens."""
        self._stops.listen()
        try:
            with opened_records(self._inputs, self._display) as records:
                status = await self._summarised(records)
        except OSError as error:
            raise Fatal(f"the run folder cannot be written: {error}") from None
        finally:
            self._stops.ignore()
        return 0 if status is RunStatus.FINISHED else 1

    async def _summarised(self, records: RunRecords) -> RunStatus:
        status, cause = RunStatus.FAILED, None
        began_at = records.progress.step
        try:
            if await self._with_roles(records):
                status = RunStatus.FINISHED
            else:
                status, cause = RunStatus.INTERRUPTED, "a stop was requested"
        except BaseException as raised:
            error = root_cause(raised)
            has_trained = records.progress.step > began_at
            if isinstance(error, UserError) and self._inputs.resume is None and not has_trained:
                # The user's mistake: no folder of a run that never began.
                shutil.rmtree(records.path, ignore_errors=True)
                raise error from None
            if not isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                _summarise(records, status, str(error) or type(error).__name__)
                raise error from None
            status, cause = RunStatus.INTERRUPTED, f"stopped after step {records.progress.step}"
        _summarise(records, status, cause)
        if status is RunStatus.INTERRUPTED:
            is_saved = latest_checkpoint(records.path) is not None
            how = "continue" if is_saved else "there is no checkpoint yet: begin again"
            self._display.message(
                f"stopped after step {records.progress.step}; {how} with --resume {records.path}"
            )
        return status

    async def _with_roles(self, records: RunRecords) -> bool:
        async with AsyncExitStack() as started:
            await started.enter_async_context(
                waits_kept(records.path, self._waits, step=lambda: records.journal.step)
            )
            recipe = self._inputs.recipe
            if not self._local:
                recipe = at_asked_sizes(recipe, records.path, self._display.message)
            with records.clock.phase("start"):
                roles = await started.enter_async_context(
                    started_roles(
                        recipe,
                        local=self._local,
                        waits=self._waits,
                        on_phase=self._display.phase,
                    )
                )
            self._stops.listen()  # Ray has put its own handlers in their place
            training = Training(roles, records, self._waits, self._stops)
            await started.enter_async_context(
                pools_kept(
                    records.path,
                    recipe,
                    roles.pools,
                    training,
                    room=roles.room,
                    say=self._display.message,
                )
            )
            return await training.run()


def _summarise(records: RunRecords, status: RunStatus, cause: str | None) -> None:
    with suppress(OSError):  # a full disk has been reported already
        records.write_summary(status, cause)
