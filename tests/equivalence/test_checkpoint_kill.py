"""SIGKILL at random moments of a checkpoint: the last complete one loads, a torn one never."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from learner.rank import LearnerRank
from orchestration.checkpoint import latest_checkpoint, load_checkpoint, read_driver_state
from orchestration.local import LocalLearner
from orchestration.manifest import find_damage
from orchestration.recipe import CheckpointConfig
from orchestration.saving import CheckpointSaver
from tests.unit.checkpoint_cases import a_report, a_state
from tests.unit.learner_cases import batch_of, random_rows, rank_of, torch_config, write_model

pytestmark = pytest.mark.slow

KILLS = 10
DEADLINE_S = 60  # of one process to begin its next checkpoint


def checksum(rank: LearnerRank) -> int:
    bundle = rank.publish(0)
    assert bundle is not None
    return bundle.checksum


def train_on(run: Path, model: str, parent: Connection) -> None:
    """Go on from the latest checkpoint and save after every step, until killed.

    Tells the parent (step, checksum of the weights) before each save, (step, seconds) after it.
    """
    asyncio.run(_train_on(run, rank_of(model, torch_config()), parent))


async def _train_on(run: Path, rank: LearnerRank, parent: Connection) -> None:
    learner = LocalLearner(rank, asyncio.Lock())
    latest, step = latest_checkpoint(run), 0
    if latest is not None:
        step = (await load_checkpoint(latest, learner, {})).step
    async with CheckpointSaver.opened(
        run,
        learner,
        CheckpointConfig(keep=1, keep_best=1),
        step=step,
        on_saved=lambda report: parent.send(("done", report.step, report.total_s)),
    ) as saver:
        while True:
            step += 1
            await learner.train(batch_of(random_rows(4, seed=step), step=step))
            parent.send(("begin", step, checksum(rank)))
            await saver.save(a_state(step), {})
            # Every third step is the best so far: markers and deletions are under way, too.
            await saver.evaluated(
                step, a_report(step / 1e6 if step % 3 == 0 else 0.0), save=saver.finished
            )
            await saver.finished()


def left_behind(ours: Connection) -> Iterator[tuple[str, int, float]]:
    """What a process had sent when it died."""
    try:
        while True:
            yield ours.recv()
    except EOFError:
        return


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), hidden_size=256)


def test_ten_kills_during_checkpoints_lose_no_more_than_the_one_being_written(
    model: str, tmp_path: Path
) -> None:
    rng = random.Random(5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learner.rank", "orchestration.saving"])
    weights: dict[int, int] = {}  # checksums by step
    checkpoint_s, complete = 0.0, 0
    for kill in range(KILLS):
        ours, theirs = context.Pipe()
        process = context.Process(target=train_on, args=(tmp_path, model, theirs))
        process.start()
        theirs.close()
        # The first process shows how long a checkpoint takes; all are killed in their second.
        begun = 0
        while begun < 2:
            assert ours.poll(DEADLINE_S), f"process {kill} hangs"
            what, step, value = ours.recv()
            if what == "begin":
                begun, weights[step] = begun + 1, value
            else:
                complete, checkpoint_s = step, max(checkpoint_s, value)
        time.sleep(rng.uniform(0, 1.1 * checkpoint_s))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for what, step, value in left_behind(ours):
            if what == "begin":
                weights[step] = value
            else:
                complete = step
        path = latest_checkpoint(tmp_path)
        assert path is not None
        assert find_damage(path, checksums=True) is None
        found = read_driver_state(path).step
        # The process may have died between the rename and its last word.
        assert found in (complete, complete + 1)
        complete = found
        rank = rank_of(model, torch_config())
        rank.load(str(path))
        assert checksum(rank) == weights[found]
