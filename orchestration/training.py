"""From started roles to the end of the schedule: evaluate, drive, save, and go on after a loss.

The learner may be lost (a rank is killed, a node disappears) or be asked to change its number of
ranks. Both end the driver and leave the pools up: the learner alone starts again from the last
checkpoint, what was written down after it is taken back, and a new driver goes on from there. The
same happens when a scorer is lost that learns.
Refuses to know how the roles are started and what a run leaves behind at its end.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from grpo.engines import Checkpointed
from grpo.errors import CoveyError, Fatal, StateLost, Transient, leaves
from orchestration.batch_files import drop_earlier
from orchestration.checkpoint import DriverState, checkpoint_folder, load_checkpoint
from orchestration.driver import Driver
from orchestration.evaluation import EvalReport
from orchestration.group_task import GroupRecipe
from orchestration.held_out import HeldOut
from orchestration.progress import Progress, planned_schedule
from orchestration.recording import RecordingLearner
from orchestration.resume import oldest_start
from orchestration.roles import START_DEADLINE_S, Roles
from orchestration.run_inputs import FREE_OF_LEARNER
from orchestration.run_records import RunRecords
from orchestration.saving import BoundedSaving, CheckpointReport, CheckpointSaver
from orchestration.stage import WaitingRows
from orchestration.stops import StopSignals
from orchestration.telemetry import ClockedEngine
from orchestration.waits import Waits
from orchestration.weight_sync import sync_weights


class Training:
    """The work of one run in this process, with as many learners in turn as it takes."""

    def __init__(self, roles: Roles, records: RunRecords, waits: Waits, stops: StopSignals) -> None:
        self._roles = roles
        self._records = records
        self._inputs = records.inputs
        self._recipe = records.inputs.recipe
        self._display = records.display
        self._clock = records.clock
        self._waits = waits
        self._stops = stops
        self._held_out = HeldOut(roles, records, waits)
        self._learner = BoundedSaving(roles.learner, waits, self._recipe.alarms.stall_s)
        self._driver: Driver | None = None
        # Of the learner that works: until another one has started, those of the one before.
        self.num_ranks = roles.restartable.num_ranks if roles.restartable is not None else 1
        self.is_restarting = False
        self.ranks_setback: str | None = None  # why it does not have those it was asked to have
        self._new_ranks: int | None = None  # asked for, not in force yet
        resume = self._inputs.resume
        # The checkpoint to go on from; None: the beginning. Not simply the newest in the folder, as
        # an older one may have been named.
        self._start = None if resume is None else resume.checkpoint
        self._losses: list[int] = []  # steps of the checkpoints that were gone back to

    def request_ranks(self, ranks: int) -> None:
        """Restart the learner with so many ranks when the step in progress is done and saved."""
        self._new_ranks, self.ranks_setback = ranks, None
        if self._driver is not None:
            self._driver.request_stop()

    async def run(self) -> bool:
        """Train; True if the schedule is complete, False if a stop was requested before."""
        is_again = False
        while True:
            try:
                if is_again:
                    await self._restart_learner()
                # Else the engines have read what the learner begins with.
                if is_again or self._start is not None or self._recipe.learner.rounds_base:
                    await self._load(is_again=is_again)
                await self._held_out.before()
                complete = await self._train()
                if complete or self._stops.was_asked:
                    return complete
            except (StateLost, ExceptionGroup) as error:
                self._count_loss(error)
            is_again = True

    def _count_loss(self, error: Exception) -> None:
        """Say what is lost; raises what cannot be mended, or led nowhere too often."""
        lost = next((leaf for leaf in leaves(error) if isinstance(leaf, StateLost)), None)
        if lost is None or self._stops.was_asked or self._roles.restartable is None:
            raise error
        step = 0 if self._start is None else int(self._start.name.rpartition("_")[2])
        self._losses = [earlier for earlier in self._losses if earlier == step] + [step]
        most = self._recipe.alarms.learner_losses
        if len(self._losses) > most:
            raise Fatal(
                f"{lost}\nthat was loss {len(self._losses)} without a new checkpoint between them; "
                f"alarms.learner_losses allows {most}. Resume the run when the cause is mended"
            ) from error
        if lost.owner is not None:
            self._waits.replacing(lost.owner, lost)
        self._records.replaced["learner"] = self._records.replaced.get("learner", 0) + 1
        self._display.message(
            f"the learner starts again and goes on from step {step} (loss {len(self._losses)} "
            f"since that checkpoint, of {most} allowed); rollout workers and scorers stay"
        )

    async def _restart_learner(self) -> None:
        """With the ranks that were asked for, or with those it had if that fails."""
        learner = self._roles.restartable
        assert learner is not None, "only a learner of actors is lost or changes its ranks"
        before, wanted = learner.num_ranks, self._new_ranks
        self._new_ranks, self.is_restarting = None, True
        if wanted is not None:
            self._display.phase(f"restarting the learner: ranks {wanted} instead of {before}")
            try:
                await self._started(wanted)
                return
            except (StateLost, Transient) as error:
                reason = str(error).partition("\n")[0]
                self.ranks_setback = f"the learner does not start with ranks={wanted}: {reason}"
                self._display.message(self.ranks_setback)
        self._display.phase("restarting the learner")
        await self._started(before)

    async def _started(self, ranks: int) -> None:
        assert self._roles.restartable is not None
        await self._waits.within(
            START_DEADLINE_S, "learner: starting", self._roles.restartable.restart(ranks)
        )
        self.num_ranks, self.is_restarting = ranks, False

    async def _load(self, *, is_again: bool) -> None:
        """Bring learner, scorers, engines and records to the checkpoint, or to the beginning."""
        rows = WaitingRows()
        state: DriverState | None = None
        if self._start is not None:
            self._display.phase(f"loading checkpoint of {self._start.name.replace('_', ' ')}")
            state = await load_checkpoint(self._start, self._learner, self._others(rows))
        else:
            for scorer in self._roles.scorer_pools.values():
                scorer.forget()
        if is_again:
            self._records.turn_back(state)
        progress = replace(self._records.progress, stage_rows=rows.rows)
        self._records.progress = progress
        await self._sync()

    async def _sync(self) -> None:
        """Give the engines the policy that the learner begins with."""
        version = self._records.progress.version
        await self._waits.within(
            self._recipe.alarms.stall_s,
            f"weight sync: version {version}",
            sync_weights(self._roles.learner, self._roles.engine, version),
        )

    async def _train(self) -> bool:
        async with CheckpointSaver.opened(
            self._records.path,
            self._learner,
            self._recipe.checkpoint,
            step=self._records.progress.step,
            on_saved=self._saved,
        ) as saver:
            await self._evaluate_late(saver)
            with self._clock.phase("train"):
                complete = await self._drive(saver)
            if complete and self._inputs.held_out:
                after = await self._evaluated(saver, "after", self._records.progress)
                self._held_out.conclude(after)
        return complete

    def _saved(self, report: CheckpointReport) -> None:
        self._start = checkpoint_folder(self._records.path, report.step)
        # Under the last step that was logged: trackers take no older one.
        self._records.telemetry.log(self._records.journal.step, report.metrics())
        start = oldest_start(self._records.path, keep=self._recipe.checkpoint.keep)
        drop_earlier(self._records.path, start)

    async def _evaluated(
        self, saver: CheckpointSaver, label: str, progress: Progress
    ) -> EvalReport:
        """An evaluation of a step of this run, which may be the best so far."""
        report = await self._held_out.measured(label, progress.step)
        await saver.evaluated(progress.step, report, save=lambda: self._save(saver, progress))
        return report

    async def _evaluate_late(self, saver: CheckpointSaver) -> None:
        """What the run ended before: its checkpoint was written, not evaluated yet."""
        progress, every = self._records.progress, self._recipe.evaluation.every
        is_during = every > 0 and 0 < progress.step < self._recipe.steps
        was_due = is_during and progress.step % every == 0 and self._inputs.held_out
        if was_due and not saver.was_evaluated(progress.step):
            await self._evaluated_during(saver, progress)

    async def _evaluated_during(self, saver: CheckpointSaver, progress: Progress) -> None:
        label = f"step {progress.step}"
        self._held_out.show(label, await self._evaluated(saver, label, progress))

    async def _drive(self, saver: CheckpointSaver) -> bool:
        driver = self._driver = self._new_driver(saver)
        self._stops.polite = driver.request_stop
        if self._new_ranks is not None:  # asked for when there was no driver to stop
            driver.request_stop()
        self._display.phase("training")
        try:
            return await driver.run()
        except (CoveyError, ExceptionGroup) as error:
            self._records.progress = driver.progress
            if driver.is_between_steps:
                await self._rescue(saver, error)
            raise
        finally:
            self._driver = self._stops.polite = None
            self._records.progress = driver.progress
            self._records.replaced |= self._roles.num_replaced

    def _new_driver(self, saver: CheckpointSaver) -> Driver:
        recipe = self._recipe

        async def evaluate(progress: Progress) -> None:
            await self._evaluated_during(saver, progress)

        async def checkpoint(progress: Progress) -> None:
            self._records.progress = progress
            if progress.step > saver.step:  # a stop right behind a checkpoint asks for it again
                await self._save(saver, progress)

        driver = Driver(
            schedule=planned_schedule(recipe),
            common=GroupRecipe(
                pipeline=self._inputs.pipeline,
                sampling=recipe.sampling.drawn(),
                run_seed=recipe.seed,
                engine=ClockedEngine(self._roles.engine, self._clock),
                tokenizer=self._inputs.tokenization,
                scorers=self._roles.scorers,
            ),
            learner=RecordingLearner(
                self._roles.learner,
                self._records.path,
                total_steps=recipe.steps,
                settings=recipe.learner.model_dump(mode="json", include=set(FREE_OF_LEARNER))
                | {"ranks": self.num_ranks},
                keeps_all=recipe.checkpoint.record_batches,
            ),
            prompt_at=self._inputs.prompts.at,
            journal=self._records.journal,
            waits=self._waits,
            progress=self._records.progress,
            evaluate=evaluate,
            checkpoint=checkpoint,
            scorer_metrics=self._roles.scorer_metrics,
        )
        return driver

    async def _rescue(self, saver: CheckpointSaver, error: BaseException) -> None:
        """Something else than the learner failed: keep what it has learnt, if it still answers."""
        if any(isinstance(leaf, StateLost) for leaf in leaves(error)):
            return
        progress = self._records.progress
        if progress.step > saver.step:
            with suppress(CoveyError, OSError):
                await self._save(saver, progress)
                await saver.finished()
                self._display.message(f"saved a checkpoint of step {progress.step}")

    async def _save(self, saver: CheckpointSaver, progress: Progress) -> None:
        with self._clock.phase("checkpoint"):
            state = self._records.driver_state(progress)
            await saver.save(state, self._others(WaitingRows(progress.stage_rows)))

    def _others(self, rows: WaitingRows) -> dict[str, Checkpointed]:
        """What a checkpoint holds beside the learner, by its folder there."""
        roles = self._roles.scorers.items()
        learning = {name: role.learning for name, role in roles if role.learning}
        return {"stage": rows, **{f"scorers/{n}": scorer for n, scorer in learning.items()}}
