"""A learner of one file twice, and checkpoints of it as a run saves them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from grpo.engines import SavedAside
from orchestration.checkpoint import DriverState, checkpoint_folder
from orchestration.evaluation import EvalReport, Measured
from orchestration.recipe import CheckpointConfig
from orchestration.saving import CheckpointReport, CheckpointSaver

FILE = "huggingface/model.safetensors"
OWN_FILE = "learner/rank_0.safetensors"


class FileLearner:
    """A learner whose whole state is its model; it refuses a folder that is not empty."""

    def __init__(self, weights: bytes = b"w" * 1000) -> None:
        self.weights = weights
        self.copy = b""

    async def snapshot(self) -> None:
        self.copy = self.weights

    async def write(self, folder: Path) -> Sequence[str]:
        assert list(folder.iterdir()) == []
        for file in (FILE, OWN_FILE):
            (folder / file).parent.mkdir()
            (folder / file).write_bytes(self.copy)
        return [FILE, OWN_FILE]

    async def load(self, folder: Path) -> None:
        self.weights = (folder / OWN_FILE).read_bytes()


def a_state(step: int) -> DriverState:
    return DriverState(step=step, version=step, seed=0, next_group=8 * step)


def a_report(passed: float, score: float = 0.0) -> EvalReport:
    """An evaluation with this pass@1 and mean score."""
    measured = Measured(
        num_prompts=1,
        num_scored=1,
        pass_at={1: passed},
        standard_error=0.0,
        mean_score=score,
        mean_length=1.0,
        clipped_ratio=0.0,
    )
    return EvalReport(num_samples=1, overall=measured)


def save(
    run: Path,
    *steps: int,
    keep: int = 2,
    keep_best: int = 0,
    begin: int = 0,
    learner: SavedAside | None = None,
    evaluations: dict[int, EvalReport] | None = None,
    state: DriverState | None = None,
) -> list[CheckpointReport]:
    """A part of a run from step `begin`: save at these steps, evaluate at those."""
    reports: list[CheckpointReport] = []
    found = evaluations or {}

    async def part() -> None:
        async with CheckpointSaver.opened(
            run,
            learner or FileLearner(),
            CheckpointConfig(keep=keep, keep_best=keep_best),
            step=begin,
            on_saved=reports.append,
        ) as saver:
            for step in sorted({*steps, *found}):
                state_of_step = state or a_state(step)
                if step in steps:
                    await saver.save(state_of_step, {})
                if step in found:
                    await saver.evaluated(
                        step, found[step], save=lambda s=state_of_step: saver.save(s, {})
                    )

    asyncio.run(part())
    return reports


def saved(run: Path, step: int, *, keep: int = 2, learner: FileLearner | None = None) -> Path:
    """The folder of one checkpoint, saved as the newest."""
    save(run, step, keep=keep, learner=learner)
    return checkpoint_folder(run, step)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())
