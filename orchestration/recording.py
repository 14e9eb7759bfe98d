"""A learner that leaves every batch it was given in the run folder, for `covey replay`.

Stands between the driver and the real learner, and passes everything on. Refuses to know where
that one runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from grpo.errors import Fatal, NonFinite
from grpo.types import Float32, MeasureRequest, StepReport, TrainBatch, TrainRow, WeightRef
from orchestration.batch_files import Outcome, RecordedBatch, forget_failure, write_batch
from orchestration.training_step import StepLearner


class RecordingLearner:
    """`keeps_all`: every batch; else only one that ends the run."""

    def __init__(
        self,
        learner: StepLearner,
        run: Path,
        *,
        total_steps: int,
        settings: Mapping[str, JsonValue],
        keeps_all: bool,
    ) -> None:
        self._learner = learner
        self._run = run
        self._total_steps = total_steps
        self._settings = settings
        self._keeps_all = keeps_all

    async def train(self, batch: TrainBatch) -> StepReport:
        try:
            report = await self._learner.train(batch)
        except Fatal as error:
            told = type(error)(f"{error}\n{await self._left(batch, error)}")
            told.__dict__ |= error.__dict__
            raise told from error
        if self._keeps_all:
            await self._write(batch, Outcome(metrics=report.metrics))
        forget_failure(self._run, batch)
        return report

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        return await self._learner.measure(request)

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return await self._learner.log_probs(rows)

    async def publish(self, version: int) -> WeightRef:
        return await self._learner.publish(version)

    async def _left(self, batch: TrainBatch, error: Fatal) -> str:
        """Keep the batch that ends the run; how to look into it."""
        place = error.place if isinstance(error, NonFinite) else None
        try:
            path = await self._write(batch, Outcome(error=str(error), place=place))
        except OSError as reason:
            return f"  what the learner was given could not be saved: {reason}"
        return (
            f"  what the learner was given is in {path}\n"
            f"  covey replay {self._run} {batch.step} computes it once more and shows the token"
        )

    async def _write(self, batch: TrainBatch, outcome: Outcome) -> Path:
        recorded = RecordedBatch(
            batch=batch, outcome=outcome, total_steps=self._total_steps, learner=self._settings
        )
        return await asyncio.to_thread(write_batch, self._run, recorded)
