"""The held-out prompts of a run: measured before, during and after training on the run's engines.

Remembers the figures of the starting model. Refuses to know when it is time and which checkpoint
is kept.
"""

from __future__ import annotations

import json
from contextlib import suppress

from orchestration.evaluation import EvalReport, evaluate
from orchestration.roles import Roles
from orchestration.run_directory import write_json
from orchestration.run_records import RunRecords
from orchestration.waits import Waits

EVALUATION_GROUPS = 1_000_000_000  # group ids of evaluations never meet those of training
BEFORE_FILE = "evaluation_before.json"


class HeldOut:
    """Evaluations of one run; there are none without held-out prompts."""

    def __init__(self, roles: Roles, records: RunRecords, waits: Waits) -> None:
        self._roles = roles
        self._records = records
        self._waits = waits
        self._prompts = records.inputs.held_out
        self._before: EvalReport | None = None  # as this process found it

    async def before(self) -> None:
        """The starting model; a resumed run keeps the figures that it began with."""
        path, inputs = self._records.path / BEFORE_FILE, self._records.inputs
        if inputs.resume is not None:
            with suppress(OSError, ValueError):  # gone or damaged: the summary lacks them
                self._records.before = json.loads(path.read_text("utf-8"))
        if inputs.state is None and self._prompts and self._records.before is None:
            self._before = await self.measured("before", 0)
            self._records.before = self._before.as_json()
            write_json(path, self._records.before)
            self._records.display.evaluation("held-out prompts, before", self._before)

    def show(self, label: str, report: EvalReport) -> None:
        """The figures of an evaluation."""
        self._records.display.evaluation(f"held-out prompts, {label}", report)

    def conclude(self, report: EvalReport) -> None:
        """The last figures, beside those of the starting model."""
        self._records.after = report.as_json()
        self._records.display.evaluation("held-out prompts", report, self._before)

    async def measured(self, label: str, step: int) -> EvalReport:
        """Ask the engines as they are; the figures are logged under this step."""
        recipe = self._records.inputs.recipe
        samples, rollout = recipe.evaluation.samples, recipe.rollout
        workers = self._roles.engine.pool.sizes.wanted
        self._records.display.phase(f"evaluating ({label})")
        with self._records.clock.phase("evaluate"), self._waits.noted(f"evaluation: {label}"):
            report = await evaluate(
                self._roles.engine,
                self._roles.scorers[recipe.scorers[0].name].scorer,
                self._prompts,
                samples=samples,
                sampling=recipe.sampling.drawn(),
                seed=recipe.seed,
                first_group=EVALUATION_GROUPS,
                concurrency=max(1, workers * rollout.max_concurrent_rollouts // samples),
            )
        self._records.telemetry.log(step, report.metrics())
        return report
