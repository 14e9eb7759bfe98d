"""One training run from a recipe to its summary: start the roles, evaluate, drive, evaluate.

Knows the order of things; refuses to know how any of them works.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from grpo.engines import Checkpointed
from grpo.errors import CoveyError, Fatal, UserError
from orchestration.batch_files import drop_earlier, drop_later
from orchestration.checkpoint import (
    DriverState,
    encoded_state,
    latest_checkpoint,
    load_checkpoint,
)
from orchestration.config import Recipe
from orchestration.display import Display
from orchestration.driver import Driver
from orchestration.evaluation import EvalReport, evaluate
from orchestration.group_task import GroupRecipe
from orchestration.journal import RunJournal
from orchestration.progress import Progress, Schedule
from orchestration.recording import RecordingLearner
from orchestration.resume import oldest_start
from orchestration.roles import Roles, local_recipe, started_roles
from orchestration.run_directory import (
    RunDirectory,
    RunStatus,
    RunSummary,
    version_changes,
    write_json,
)
from orchestration.run_inputs import RunInputs, read_inputs
from orchestration.saving import BoundedSaving, CheckpointReport, CheckpointSaver
from orchestration.stage import WaitingRows
from orchestration.stops import StopSignals
from orchestration.telemetry import ClockedEngine, PhaseClock, Telemetry
from orchestration.versions import software_versions
from orchestration.waits import Waits
from orchestration.waits_file import waits_kept
from orchestration.weight_sync import sync_weights

EVALUATION_GROUPS = 1_000_000_000  # group ids of evaluations never meet those of training
BEFORE_FILE = "evaluation_before.json"


def train(recipe: Recipe, *, local: bool, resume: Path | None) -> int:
    """Run the recipe; the exit status is 0 only if its schedule was completed."""
    recipe = local_recipe(recipe) if local else recipe
    inputs = read_inputs(recipe, None if resume is None else str(resume))
    with Display.open() as display:
        return asyncio.run(_Run(inputs, display, local=local).train())


class _Run:
    """The state of one run in this process."""

    def __init__(self, inputs: RunInputs, display: Display, *, local: bool) -> None:
        self._inputs = inputs
        self._recipe = inputs.recipe
        self._display = display
        self._local = local
        self._waits = Waits(on_trouble=display.message)
        self._clock = PhaseClock()
        self._versions = software_versions()
        self._before: Mapping[str, object] | None = None
        self._after: Mapping[str, object] | None = None
        self._progress = inputs.progress()
        self._logged_step: Callable[[], int] = lambda: self._progress.step
        self._replaced: Mapping[str, int] = {}
        self._stops = StopSignals(display.message)

    async def train(self) -> int:
        """Open the run folder, train, and leave a summary whatever happens."""
        self._stops.listen()
        with ExitStack() as open_files:
            open_files.callback(self._stops.ignore)
            self._run = self._run_directory()
            open_files.callback(self._run.close)
            self._telemetry = Telemetry.open(
                self._run,
                self._recipe.trackers,
                config=self._recipe.model_dump(mode="json"),
                resumed_step=None if self._inputs.state is None else self._progress.step,
            )
            open_files.callback(self._telemetry.close)
            self._journal = RunJournal(
                run=self._run,
                telemetry=self._telemetry,
                display=self._display,
                clock=self._clock,
                pipeline=self._inputs.pipeline,
                total_steps=self._recipe.steps,
                step=self._progress.step,
            )
            if self._inputs.state is not None:
                self._clock.totals.update(self._inputs.state.wall_s)
                self._journal.dropped_by_reason.update(self._inputs.state.counters)
                self._journal.skipped_by_reason.update(self._inputs.state.skipped)
                with suppress(OSError):
                    self._before = json.loads((self._run.path / BEFORE_FILE).read_text("utf-8"))
            return await self._summarised()

    def _run_directory(self) -> RunDirectory:
        if self._inputs.resume is not None:
            path = self._inputs.resume.run
            run = RunDirectory.reopen(path, step=self._progress.step)
            drop_later(path, self._progress.step)
            for change in version_changes(path, self._versions):
                self._display.message(f"software changed since this run began: {change}")
        else:
            run = RunDirectory.create(
                Path(self._recipe.output),
                self._recipe.name,
                now=datetime.now(),
                config=self._recipe.model_dump(mode="json"),
                versions=self._versions,
            )
        self._display.message(f"run folder: {run.path}")
        return run

    async def _summarised(self) -> int:
        status, cause = RunStatus.FAILED, None
        try:
            if await self._with_roles():
                status = RunStatus.FINISHED
            else:
                status, cause = RunStatus.INTERRUPTED, "a stop was requested"
        except BaseException as raised:
            error = root_cause(raised)
            if isinstance(error, UserError) and self._inputs.resume is None and not self._trained:
                # The user's mistake: no folder of a run that never began.
                shutil.rmtree(self._run.path, ignore_errors=True)
                raise error from None
            if not isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                cause = str(error) or type(error).__name__
                self._summarise(status, cause)
                if isinstance(error, OSError):
                    raise Fatal(f"the run folder cannot be written: {error}") from None
                raise error from None
            status, cause = RunStatus.INTERRUPTED, f"stopped after step {self._progress.step}"
        self._summarise(status, cause)
        if status is RunStatus.INTERRUPTED:
            can_resume = latest_checkpoint(self._run.path) is not None
            again = f"; continue with --resume {self._run.path}" if can_resume else ""
            self._display.message(f"stopped after step {self._progress.step}{again}")
        return 0 if status is RunStatus.FINISHED else 1

    @property
    def _trained(self) -> bool:
        return self._progress.step > self._inputs.progress().step

    def _summarise(self, status: RunStatus, cause: str | None) -> None:
        with suppress(OSError):  # a full disk has been reported already
            self._run.write_summary(self._summary(status, cause))

    async def _with_roles(self) -> bool:
        async with AsyncExitStack() as started:
            await started.enter_async_context(
                waits_kept(self._run.path, self._waits, step=lambda: self._logged_step())
            )
            with self._clock.phase("start"):
                roles = await started.enter_async_context(
                    started_roles(
                        self._recipe,
                        local=self._local,
                        waits=self._waits,
                        on_phase=self._display.phase,
                    )
                )
            self._stops.listen()  # Ray has put its own handlers in their place
            return await self._train_with(roles)

    async def _train_with(self, roles: Roles) -> bool:
        if self._inputs.state is not None:
            await self._continue_from_checkpoint(roles)
        before = await self._evaluate_before(roles)
        async with CheckpointSaver.opened(
            self._run.path,
            BoundedSaving(roles.learner, self._waits, self._recipe.alarms.stall_s),
            self._recipe.checkpoint,
            step=self._progress.step,
            on_saved=self._saved,
        ) as saver:
            with self._clock.phase("train"):
                complete = await self._drive(roles, saver)
            if complete and self._inputs.held_out:
                after = await self._evaluated_since(roles, saver, "after", self._progress)
                self._after = after.as_json()
                self._display.evaluation("held-out prompts", after, before)
        return complete

    def _saved(self, report: CheckpointReport) -> None:
        # Under the last step that was logged: trackers take no older one.
        self._telemetry.log(self._logged_step(), report.metrics())
        start = oldest_start(self._run.path, keep=self._recipe.checkpoint.keep)
        drop_earlier(self._run.path, start)

    async def _continue_from_checkpoint(self, roles: Roles) -> None:
        assert self._inputs.resume is not None
        self._display.phase(f"loading checkpoint of step {self._progress.step}")
        rows = WaitingRows()
        others = _others(roles, rows)
        learner = BoundedSaving(roles.learner, self._waits, self._recipe.alarms.stall_s)
        await load_checkpoint(self._inputs.resume.checkpoint, learner, others)
        self._progress = replace(self._progress, stage_rows=rows.rows)
        await self._waits.within(
            self._recipe.alarms.stall_s,
            f"weight sync: version {self._progress.version}",
            sync_weights(roles.learner, roles.engine, self._progress.version),
        )

    async def _evaluate_before(self, roles: Roles) -> EvalReport | None:
        """A resumed run keeps the figures that it began with."""
        path = self._run.path / BEFORE_FILE
        if self._inputs.state is not None or not self._inputs.held_out:
            return None
        before = await self._evaluated(roles, "before", 0)
        self._before = before.as_json()
        write_json(path, self._before)
        self._display.evaluation("held-out prompts, before", before)
        return before

    async def _evaluated(self, roles: Roles, label: str, step: int) -> EvalReport:
        recipe = self._recipe
        self._display.phase(f"evaluating ({label})")
        with self._clock.phase("evaluate"), self._waits.noted(f"evaluation: {label}"):
            report = await evaluate(
                roles.engine,
                roles.scorers[recipe.scorers[0].name].scorer,
                self._inputs.held_out,
                samples=recipe.evaluation.samples,
                sampling=recipe.sampling.drawn(),
                seed=recipe.seed,
                first_group=EVALUATION_GROUPS,
                concurrency=max(
                    1,
                    recipe.rollout.workers
                    * recipe.rollout.max_concurrent_rollouts
                    // recipe.evaluation.samples,
                ),
            )
        self._telemetry.log(step, report.metrics())
        return report

    async def _evaluated_since(
        self, roles: Roles, saver: CheckpointSaver, label: str, progress: Progress
    ) -> EvalReport:
        """An evaluation of a step of this run, which may be the best so far."""
        report = await self._evaluated(roles, label, progress.step)
        await saver.evaluated(
            progress.step, report, save=lambda: self._save(roles, saver, progress)
        )
        return report

    async def _drive(self, roles: Roles, saver: CheckpointSaver) -> bool:
        recipe = self._recipe

        async def evaluate_during(step: int) -> None:
            report = await self._evaluated_since(roles, saver, f"step {step}", driver.progress)
            self._display.evaluation(f"held-out prompts, step {step}", report)

        async def checkpoint(progress: Progress) -> None:
            self._progress = progress
            if progress.step > saver.step:  # a stop right behind a checkpoint asks for it again
                await self._save(roles, saver, progress)

        driver = Driver(
            schedule=planned_schedule(recipe),
            common=GroupRecipe(
                pipeline=self._inputs.pipeline,
                sampling=recipe.sampling.drawn(),
                run_seed=recipe.seed,
                engine=ClockedEngine(roles.engine, self._clock),
                tokenizer=self._inputs.tokenization,
                scorers=roles.scorers,
            ),
            learner=RecordingLearner(
                roles.learner,
                self._run.path,
                total_steps=recipe.steps,
                keeps_all=recipe.checkpoint.record_batches,
            ),
            prompt_at=self._inputs.prompts.at,
            journal=self._journal,
            waits=self._waits,
            progress=self._progress,
            evaluate=evaluate_during,
            checkpoint=checkpoint,
            scorer_metrics=roles.scorer_metrics,
        )
        self._logged_step = lambda: driver.progress.step
        self._stops.polite = driver.request_stop
        self._display.phase("training")
        try:
            return await driver.run()
        except BaseException as raised:
            self._progress = driver.progress
            if driver.is_between_steps and not isinstance(
                root_cause(raised), asyncio.CancelledError
            ):
                await self._rescue(roles, saver)
            raise
        finally:
            self._stops.polite = None
            self._progress = driver.progress
            self._replaced = roles.num_replaced

    async def _rescue(self, roles: Roles, saver: CheckpointSaver) -> None:
        """Something else than the learner failed: keep what it has learnt, if it still answers."""
        if self._progress.step > saver.step:
            with suppress(CoveyError, OSError):
                await self._save(roles, saver, self._progress)
                await saver.finished()
                self._display.message(f"saved a checkpoint of step {self._progress.step}")

    async def _save(self, roles: Roles, saver: CheckpointSaver, progress: Progress) -> None:
        with self._clock.phase("checkpoint"):
            await saver.save(
                DriverState(
                    step=progress.step,
                    version=progress.version,
                    seed=self._recipe.seed,
                    next_group=progress.next_group,
                    pending=progress.pending,
                    prompts={"num_prompts": len(self._inputs.prompts)},
                    algorithm=encoded_state(progress.algorithm_state),
                    counters=dict(self._journal.dropped_by_reason),
                    skipped=dict(self._journal.skipped_by_reason),
                    wall_s=dict(self._clock.totals),
                    tokens={"generated": progress.num_tokens},
                ),
                _others(roles, WaitingRows(progress.stage_rows)),
            )

    def _summary(self, status: RunStatus, cause: str | None) -> RunSummary:
        return RunSummary(
            name=self._recipe.name,
            status=status,
            cause=cause,
            seed=self._recipe.seed,
            steps=self._progress.step,
            planned_steps=self._recipe.steps,
            before=self._before,
            after=self._after,
            wall_s=dict(self._clock.totals),
            tokens={"generated": self._progress.num_tokens},
            dropped=dict(self._journal.dropped_by_reason),
            skipped=dict(self._journal.skipped_by_reason),
            replaced=self._replaced,
            versions=self._versions,
        )


def planned_schedule(recipe: Recipe) -> Schedule:
    """What the recipe asks of the driver."""
    return Schedule(
        steps=recipe.steps,
        groups_per_step=recipe.sampled_per_step,
        replayed_per_step=recipe.replayed_per_step,
        replay_steps=recipe.replay.steps,
        updates_per_step=recipe.updates_per_step,
        epochs_per_step=recipe.epochs_per_step,
        max_staleness=recipe.max_staleness,
        window=recipe.window,
        checkpoint_every=recipe.checkpoint.every,
        evaluate_every=recipe.evaluation.every if recipe.data.evaluation else 0,
        max_log_prob_gap=recipe.alarms.log_prob_gap,
        max_dropped_rate=recipe.alarms.dropped_rate,
        max_steps_without_signal=recipe.alarms.steps_without_signal,
        take_deadline_s=recipe.alarms.stall_s,
        train_deadline_s=recipe.alarms.stall_s,
        sync_deadline_s=recipe.alarms.stall_s,
    )


def _others(roles: Roles, rows: WaitingRows) -> dict[str, Checkpointed]:
    """What a checkpoint holds beside the learner, by its folder there."""
    learning = {name: role.learning for name, role in roles.scorers.items() if role.learning}
    return {"stage": rows, **{f"scorers/{name}": scorer for name, scorer in learning.items()}}


def root_cause(error: BaseException) -> BaseException:
    """The first leaf of a group: what failed later was cancelled, or is a consequence."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
