"""Saving while training goes on: who waits for what, what stays on disk, what a failure does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from grpo.errors import Fatal
from orchestration import saving
from orchestration.checkpoint import complete_checkpoint, latest_checkpoint, mark, marked_step
from orchestration.recipe import CheckpointConfig
from orchestration.saving import CheckpointReport, CheckpointSaver
from tests.unit.checkpoint_cases import FileLearner, a_report, a_state, names, save


class SlowLearner(FileLearner):
    """Writes when it is let; counts what happens at a time."""

    def __init__(self) -> None:
        super().__init__(b"0")
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.num_writing = 0

    async def write(self, folder: Path) -> Sequence[str]:
        self.num_writing += 1
        assert self.num_writing == 1, "two checkpoints at a time"
        self.begun.set()
        await self.gate.wait()
        self.num_writing -= 1
        return await super().write(folder)


class FullDisk(FileLearner):
    """Fails in the background."""

    async def write(self, folder: Path) -> Sequence[str]:
        await asyncio.sleep(0)
        raise Fatal("no space left on device")


def opened(
    run: Path, learner: FileLearner, reports: list[CheckpointReport]
) -> AbstractAsyncContextManager[CheckpointSaver]:
    return CheckpointSaver.opened(run, learner, CheckpointConfig(), step=0, on_saved=reports.append)


def test_training_goes_on_while_the_copy_of_its_state_is_written(tmp_path: Path) -> None:
    reports: list[CheckpointReport] = []

    async def part() -> None:
        learner = SlowLearner()
        async with opened(tmp_path, learner, reports) as saver:
            await saver.save(a_state(1), {})
            await learner.begun.wait()
            learner.weights = b"trained on"
            assert latest_checkpoint(tmp_path) is None
            second = asyncio.create_task(saver.save(a_state(2), {}))
            await asyncio.sleep(0)
            assert not second.done()  # one at a time
            assert reports == []
            learner.gate.set()
            await second

    asyncio.run(part())
    root = tmp_path / "checkpoints"
    assert (root / "step_1/huggingface/model.safetensors").read_bytes() == b"0"
    assert (root / "step_2/huggingface/model.safetensors").read_bytes() == b"trained on"
    assert [report.step for report in reports] == [1, 2]  # the end of the block waits
    assert all(0 < report.blocked_s < report.total_s for report in reports)


def test_a_write_that_fails_ends_training_with_its_cause(tmp_path: Path) -> None:
    async def part() -> None:
        async with opened(tmp_path, FullDisk(), []) as saver:
            await saver.save(a_state(1), {})
            await asyncio.Event().wait()  # training, without end
            raise AssertionError("training was not stopped")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(part())
    assert caught.group_contains(Fatal, match="no space left")


def test_a_failure_of_training_lets_the_write_come_to_its_end(tmp_path: Path) -> None:
    async def part() -> None:
        learner = SlowLearner()
        async with opened(tmp_path, learner, []) as saver:
            await saver.save(a_state(1), {})
            await learner.begun.wait()
            asyncio.get_running_loop().call_soon(learner.gate.set)
            raise RuntimeError("a worker is lost")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(part())
    assert caught.group_contains(RuntimeError, match="a worker is lost")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_1"


def test_a_checkpoint_that_is_completed_while_others_are_sorted_out_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted was decided before, and the new one is not in it."""
    learner, completed = SlowLearner(), threading.Event()

    async def complete(*arguments: object) -> Path:
        folder = await complete_checkpoint(*arguments)  # type: ignore[arg-type]
        completed.set()
        return folder

    async def part() -> None:
        loop = asyncio.get_running_loop()

        def mark_later(*arguments: object) -> None:
            """Between the decision and the deletion, in a thread."""
            loop.call_soon_threadsafe(learner.gate.set)
            assert completed.wait(timeout=60)

        config = CheckpointConfig(keep=1)
        async with CheckpointSaver.opened(
            tmp_path, learner, config, step=0, on_saved=lambda report: None
        ) as saver:
            learner.gate.set()
            await saver.save(a_state(1), {})
            await saver.finished()
            completed.clear()
            learner.gate.clear()
            await saver.save(a_state(2), {})
            monkeypatch.setattr(saving, "mark", mark_later)
            await saver.evaluated(2, a_report(0.5), save=saver.finished)
            monkeypatch.setattr(saving, "mark", mark)

    monkeypatch.setattr(saving, "complete_checkpoint", complete)
    asyncio.run(part())
    assert marked_step(tmp_path, "best") == 2
    assert names(tmp_path) == ["best", "evaluations.json", "latest", "step_2"]


def test_the_best_is_kept_beside_the_newest_and_marked(tmp_path: Path) -> None:
    found = {1: a_report(0.2), 2: a_report(0.6), 3: a_report(0.4), 4: a_report(0.5)}
    save(tmp_path, 1, 2, 3, 4, keep=1, keep_best=1, evaluations=found)
    assert names(tmp_path) == ["best", "evaluations.json", "latest", "step_2", "step_4"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_2\n"
    assert marked_step(tmp_path, "latest") == 4
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_4"


def test_a_step_that_was_evaluated_but_not_saved_is_saved_if_it_is_the_best(
    tmp_path: Path,
) -> None:
    found = {2: a_report(0.2), 4: a_report(0.6), 6: a_report(0.4)}
    save(tmp_path, 5, keep=1, keep_best=1, evaluations=found)
    assert names(tmp_path) == ["best", "evaluations.json", "latest", "step_4", "step_5"]
    assert marked_step(tmp_path, "best") == 4


def test_equal_pass_rates_are_told_apart_by_mean_score_and_then_by_age(tmp_path: Path) -> None:
    found = {1: a_report(0.0, 0.1), 2: a_report(0.0, 0.3), 3: a_report(0.0, 0.3)}
    save(tmp_path, 1, 2, 3, keep=1, keep_best=1, evaluations=found)
    assert marked_step(tmp_path, "best") == 2


def test_a_resumed_run_compares_with_the_best_of_its_earlier_part(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, keep=1, keep_best=1, evaluations={1: a_report(0.6), 2: a_report(0.1)})
    save(tmp_path, 3, keep=1, keep_best=1, begin=2, evaluations={3: a_report(0.5)})
    assert names(tmp_path) == ["best", "evaluations.json", "latest", "step_1", "step_3"]
    save(tmp_path, 4, keep=1, keep_best=1, begin=3, evaluations={4: a_report(0.7)})
    assert names(tmp_path) == ["best", "evaluations.json", "latest", "step_4"]
    evaluations = json.loads((tmp_path / "checkpoints" / "evaluations.json").read_text())
    assert evaluations["steps"]["1"] == [0.6, 0.0]


def test_the_best_of_a_part_that_was_abandoned_is_forgotten(tmp_path: Path) -> None:
    found = {1: a_report(0.2), 2: a_report(0.9)}
    save(tmp_path, 1, 2, keep=2, keep_best=1, evaluations=found)
    save(tmp_path, 2, keep=2, keep_best=1, begin=1, evaluations={2: a_report(0.1)})
    assert marked_step(tmp_path, "best") == 1


def test_without_keep_best_nothing_but_age_counts(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1, keep_best=1, evaluations={1: a_report(0.9)})
    save(tmp_path, 2, keep=1, keep_best=0, begin=1, evaluations={2: a_report(0.1)})
    assert names(tmp_path) == ["evaluations.json", "latest", "step_2"]
