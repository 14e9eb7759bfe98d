"""How long training waits for a checkpoint, against how long the checkpoint takes.

    python -m benchmarks.checkpoint                      about 1M, 10M and 100M parameters
    python -m benchmarks.checkpoint --sizes 1M --saves 9

Random Qwen2-shaped models in float32, the plain torch learner, the saver of a run. The learner
takes steps all the while, as in a run, so that reading, hashing and flushing compete with them.
`blocked` is what the loop that trains waits for: the copy of masters, optimiser state and
published weights. `total` ends when the checkpoint is in force: written, hashed, flushed, renamed.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from grpo.types import Origin, TrainBatch, TrainRow
from learner.config import LearnerConfig
from learner.rank import LearnerRank
from orchestration.checkpoint import DriverState
from orchestration.local import LocalLearner
from orchestration.recipe import CheckpointConfig
from orchestration.saving import CheckpointReport, CheckpointSaver

VOCABULARY = 1024
TOKENS, ROWS = 32, 4  # of a step: small, as the model and not the batch is what is saved
SHAPES = {"1M": (128, 4), "10M": (384, 6), "100M": (1024, 8)}  # hidden size, layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model size."""

    num_parameters: int
    reports: Sequence[CheckpointReport]
    alone_s: float  # a step while nothing is written
    beside_s: float  # a step while a checkpoint is written


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--saves", type=int, default=5, help="checkpoints of each size (5)")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    print(f"medians of {options.saves} checkpoints, the first of each size apart")
    print(
        f"{'parameters':>12}{'blocked s':>12}{'total s':>10}{'ratio':>8}{'first':>8}"
        f"{'step s':>10}{'beside':>8}"
    )
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            print(_line(asyncio.run(_measured(Path(folder), *SHAPES[size], options.saves))))


def _line(found: Measured) -> str:
    first, *later = found.reports
    blocked = median(report.blocked_s for report in later)
    total = median(report.total_s for report in later)
    ratio = median(report.blocked_s / report.total_s for report in later)
    return (
        f"{found.num_parameters / 1e6:>11.1f}M{blocked:>12.4f}{total:>10.3f}{ratio:>8.3f}"
        f"{first.blocked_s / first.total_s:>8.3f}{found.alone_s:>10.3f}{found.beside_s:>8.3f}"
    )


async def _measured(folder: Path, hidden_size: int, layers: int, saves: int) -> Measured:
    rank, num_parameters = _started(folder / "model", hidden_size, layers)
    learner = LocalLearner(rank, asyncio.Lock())
    reports: list[CheckpointReport] = []
    alone: list[float] = []
    beside: list[float] = []
    async with CheckpointSaver.opened(
        folder / "run",
        learner,
        CheckpointConfig(keep=1, keep_best=0),
        step=0,
        on_saved=reports.append,
    ) as saver:
        for step in range(1, saves + 2):
            alone += [await _step_seconds(learner, step) for _ in range(2)]
            await saver.save(_state(step), {})
            while len(reports) < step:
                beside.append(await _step_seconds(learner, step))
    return Measured(
        num_parameters=num_parameters,
        reports=reports,
        alone_s=median(alone[1:]),
        beside_s=median(beside),
    )


async def _step_seconds(learner: LocalLearner, step: int) -> float:
    started = time.perf_counter()
    await learner.train(_batch(step))
    return time.perf_counter() - started


def _started(folder: Path, hidden_size: int, layers: int) -> tuple[LearnerRank, int]:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    rank = LearnerRank(
        model=str(folder),
        config=LearnerConfig(backend="torch"),
        algorithm={"name": "grpo", "num_generations": ROWS},
        total_steps=1000,
        temperature=1.0,
        rank=0,
        world_size=1,
        master="127.0.0.1:0",
        seed=0,
    )
    rank.start()
    return rank, model.num_parameters()


def _batch(step: int) -> TrainBatch:
    rng = np.random.default_rng(step)
    return TrainBatch(step=step, version=step, updates=(tuple(_row(rng, n) for n in range(ROWS)),))


def _row(rng: np.random.Generator, index: int) -> TrainRow:
    return TrainRow(
        group=0,
        index=index,
        context=rng.integers(0, VOCABULARY, 8).astype(np.int32),
        tokens=rng.integers(0, VOCABULARY, TOKENS).astype(np.int32),
        weights=np.full(TOKENS, 1 / (ROWS * TOKENS), np.float32),
        advantages=np.full(TOKENS, rng.normal(), np.float32),
        policy_weights=np.ones(TOKENS, np.float32),
        behaviour_log_probs=np.full(TOKENS, -7.0, np.float32),
        versions=np.zeros(TOKENS, np.int32),
        origins=np.full(TOKENS, Origin.POLICY, np.uint8),
    )


def _state(step: int) -> DriverState:
    return DriverState(step=step, version=step, seed=0, next_group=step)


if __name__ == "__main__":
    main()
