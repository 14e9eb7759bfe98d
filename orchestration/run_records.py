"""All that one run writes down: its folder, metrics, groups, trackers and seconds by phase.

Opened at the step from which the run goes on, and turned back when the learner is. Refuses to know
what is trained and when a checkpoint is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from orchestration.batch_files import drop_later
from orchestration.best import mend_evaluations
from orchestration.checkpoint import DriverState, abandon_later, encoded_state
from orchestration.data_metrics import DataMetrics
from orchestration.display import Display
from orchestration.journal import RunJournal
from orchestration.progress import Progress
from orchestration.run_directory import RunDirectory, RunStatus, RunSummary, version_changes
from orchestration.run_inputs import RunInputs
from orchestration.telemetry import PhaseClock, Telemetry
from orchestration.versions import software_versions


@dataclass(slots=True, kw_only=True, eq=False)
class RunRecords:
    """Owns what is written below the folder of a run, but for checkpoints and recorded batches."""

    inputs: RunInputs
    display: Display
    run: RunDirectory
    telemetry: Telemetry
    journal: RunJournal
    clock: PhaseClock
    versions: Mapping[str, str]
    # What the summary says beside the records.
    progress: Progress
    before: Mapping[str, object] | None = None
    after: Mapping[str, object] | None = None
    replaced: dict[str, int] = field(default_factory=dict)  # lost workers by role

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self.run.path

    def turn_back(self, state: DriverState | None) -> None:
        """Forget everything after this state; None: everything. Seconds spent stay spent."""
        self.progress = self.inputs.progress_at(state)
        self.run.turn_back(self.progress.step)
        self.telemetry.turn_back(self.progress.step)
        self._count_from(state)
        drop_later(self.path, self.progress.step)

    def driver_state(self, progress: Progress) -> DriverState:
        """The driver's part of a checkpoint at this point."""
        return DriverState(
            step=progress.step,
            version=progress.version,
            seed=self.inputs.recipe.seed,
            next_group=progress.next_group,
            pending=progress.pending,
            prompts=self.inputs.prompts.record,
            algorithm=encoded_state(progress.algorithm_state),
            counters=dict(self.journal.dropped_by_reason),
            skipped=dict(self.journal.skipped_by_reason),
            wall_s=dict(self.clock.totals),
            tokens={"generated": progress.num_tokens},
        )

    def write_summary(self, status: RunStatus, cause: str | None) -> None:
        """Leave summary.json."""
        recipe = self.inputs.recipe
        self.run.write_summary(
            RunSummary(
                name=recipe.name,
                status=status,
                cause=cause,
                seed=recipe.seed,
                steps=self.progress.step,
                planned_steps=recipe.steps,
                before=self.before,
                after=self.after,
                wall_s=dict(self.clock.totals),
                tokens={"generated": self.progress.num_tokens},
                dropped=dict(self.journal.dropped_by_reason),
                skipped=dict(self.journal.skipped_by_reason),
                replaced=self.replaced,
                versions=self.versions,
            )
        )

    def _count_from(self, state: DriverState | None) -> None:
        self.journal.turn_back(
            0 if state is None else state.step,
            dropped={} if state is None else state.counters,
            skipped={} if state is None else state.skipped,
        )


@contextmanager
def opened_records(inputs: RunInputs, display: Display) -> Iterator[RunRecords]:
    """The records of a new run, or of one that goes on where its checkpoint was written."""
    recipe, state, progress = inputs.recipe, inputs.state, inputs.progress_at(inputs.state)
    versions, clock = software_versions(), PhaseClock()
    with ExitStack() as open_files:
        run = _run_directory(inputs, display, versions)
        open_files.callback(run.close)
        telemetry = Telemetry.open(
            run,
            recipe.trackers,
            config=recipe.model_dump(mode="json"),
            resumed_step=None if inputs.resume is None else progress.step,
        )
        open_files.callback(telemetry.close)
        records = RunRecords(
            inputs=inputs,
            display=display,
            run=run,
            telemetry=telemetry,
            journal=RunJournal(
                run=run,
                telemetry=telemetry,
                display=display,
                clock=clock,
                pipeline=inputs.pipeline,
                data=DataMetrics(inputs.prompts),
                total_steps=recipe.steps,
            ),
            clock=clock,
            versions=versions,
            progress=progress,
        )
        if state is not None:
            clock.totals.update(state.wall_s)
            records._count_from(state)
        yield records


def _run_directory(
    inputs: RunInputs, display: Display, versions: Mapping[str, str]
) -> RunDirectory:
    recipe = inputs.recipe
    if inputs.resume is not None:
        path, step = inputs.resume.run, inputs.progress_at(inputs.state).step
        # In this order: a checkpoint whose records are cut off must not be one to resume from.
        run = RunDirectory.reopen(
            path, step=step, first=partial(_take_checkpoints_back, path, step, display.message)
        )
        run.change_config(recipe.model_dump(mode="json"))  # in what may differ: `steps`, alarms
        drop_later(path, step)
        for found in inputs.resume.remarks:
            display.message(found)
        for found in run.remarks:
            display.message(f"the records are damaged: {found}")
        for change in version_changes(path, versions):
            display.message(f"software changes since this run began: {change}")
    else:
        run = RunDirectory.create(
            Path(recipe.output),
            recipe.name,
            now=datetime.now(),
            config=recipe.model_dump(mode="json"),
            versions=versions,
        )
    display.message(f"run folder: {run.path}")
    return run


def _take_checkpoints_back(run: Path, step: int, remark: Callable[[str], None]) -> None:
    mend_evaluations(run, step, remark)
    abandon_later(run, step)
