"""Recorded batches: bit for bit what the learner was given, once, and only as long as needed."""

from __future__ import annotations

import asyncio
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import Fatal, NonFinite, OutOfMemory, StateLost, UserError
from grpo.types import StepReport, TrainBatch, TrainRow
from orchestration.batch_files import (
    Outcome,
    RecordedBatch,
    batch_files,
    drop_earlier,
    drop_later,
    read_batch,
    write_batch,
)
from orchestration.recording import RecordingLearner
from orchestration.resume import oldest_start
from tests.fakes import FakeLearner
from tests.unit.checkpoint_cases import save
from tests.unit.learner_cases import batch_of, random_rows

DONE = Outcome(metrics={"loss": 0.1 + 0.2, "grad_norm": float("nan")})


def recorded(batch: TrainBatch, outcome: Outcome = DONE) -> RecordedBatch:
    return RecordedBatch(batch=batch, outcome=outcome, total_steps=9, learner={"ranks": 2})


def assert_same_row(ours: TrainRow, theirs: TrainRow) -> None:
    for field in fields(TrainRow):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


def names(run: Path) -> list[str]:
    return [file.path.name for file in batch_files(run)]


def write_steps(run: Path, *steps: int) -> None:
    for step in steps:
        write_batch(run, recorded(batch_of(random_rows(1), step=step)))


def test_a_batch_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rows = random_rows(5)
    rows[1] = replace(rows[1], reference_log_probs=-rows[1].weights, is_cross_context=True)
    rows[2] = replace(rows[2], advantages=np.full_like(rows[2].advantages, np.nan))
    batch = replace(batch_of(rows[:3], rows[3:], rows[:3], step=4, version=3), is_stage=True)
    batch = replace(batch, learning_rate_scale=0.1)
    found = read_batch(write_batch(tmp_path, recorded(batch)))
    numbers = ("step", "version", "is_stage", "learning_rate_scale")
    assert [getattr(found.batch, n) for n in numbers] == [getattr(batch, n) for n in numbers]
    assert found.total_steps == 9
    assert found.learner == {"ranks": 2}
    for ours, theirs in zip(found.batch.updates, batch.updates, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_row(a, b)
    assert found.outcome.metrics is not None
    assert found.outcome.metrics["loss"] == 0.1 + 0.2
    assert math.isnan(found.outcome.metrics["grad_norm"])


def test_rows_of_several_epochs_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    rows = random_rows(40)
    once = write_batch(tmp_path, recorded(batch_of(rows, step=1)))
    thrice = write_batch(tmp_path, recorded(batch_of(rows, rows, rows, step=2)))
    assert thrice.stat().st_size < 1.1 * once.stat().st_size
    first, second, _ = read_batch(thrice).batch.updates
    # The learner packs rows that it meets again by identity.
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_a_file_that_is_none_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = write_batch(tmp_path, recorded(batch_of(random_rows(2), step=1)))
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"step_1\.npz is no recorded batch, or is damaged"):
            read_batch(path)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_one_bit_of_a_file_is_noticed_or_changes_nothing(tmp_path: Path, bit: int) -> None:
    rows = random_rows(2)
    path = write_batch(tmp_path, recorded(batch_of(rows, step=1)))
    whole = path.read_bytes()
    num_noticed, directory = 0, whole.index(b"PK\x01\x02")
    # All of the directory, where zipfile raises what it likes; now and then one before it.
    for place in [*range(0, directory, 41), *range(directory, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            found = read_batch(path).batch
        except UserError as error:
            assert "is no recorded batch, or is damaged" in str(error)
            num_noticed += 1
            continue
        for ours, theirs in zip(found.updates[0], rows, strict=True):
            assert_same_row(ours, theirs)
    assert num_noticed > 100


def test_files_of_a_write_that_was_cut_off_are_not_seen(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    (tmp_path / "batches" / ".step_2.npz.draft").write_bytes(b"half")
    assert names(tmp_path) == ["step_1.npz"]


def test_a_resumed_run_forgets_later_batches_and_a_checkpoint_earlier_ones(tmp_path: Path) -> None:
    write_steps(tmp_path, 3, 4, 5, 10)
    stage = replace(batch_of(random_rows(1), step=4), is_stage=True)
    write_batch(tmp_path, recorded(stage))
    assert names(tmp_path) == [
        "step_3.npz",
        "step_4.npz",
        "step_4_stage.npz",
        "step_5.npz",
        "step_10.npz",
    ]
    drop_later(tmp_path, 5)
    drop_earlier(tmp_path, 3)
    assert names(tmp_path) == ["step_4.npz", "step_4_stage.npz", "step_5.npz"]


def test_batches_go_back_to_the_oldest_checkpoint_and_the_initial_model_is_one(
    tmp_path: Path,
) -> None:
    assert oldest_start(tmp_path, keep=1) == 0
    save(tmp_path, 50, 100)
    (tmp_path / "checkpoints" / "step_150").mkdir()  # never completed
    assert [oldest_start(tmp_path, keep=keep) for keep in (1, 2, 3, 4)] == [100, 50, 0, 0]


class FailingLearner(FakeLearner):
    """Raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def train(self, batch: TrainBatch) -> StepReport:
        raise self.error


def train(learner: FakeLearner, run: Path, *, keeps_all: bool) -> None:
    recording = RecordingLearner(
        learner, run, total_steps=9, settings={"ranks": 2}, keeps_all=keeps_all
    )
    asyncio.run(recording.train(batch_of(random_rows(2), step=7)))


def test_every_batch_is_kept_with_what_the_learner_reported(tmp_path: Path) -> None:
    train(FakeLearner(), tmp_path, keeps_all=True)
    found = read_batch(tmp_path / "batches" / "step_7.npz")
    assert found.outcome.metrics is not None
    assert found.outcome.metrics["log_prob_gap/mean"] == 0.0


def test_without_recording_nothing_is_written_until_a_step_fails(tmp_path: Path) -> None:
    train(FakeLearner(), tmp_path, keeps_all=False)
    assert not (tmp_path / "batches").exists()
    error = NonFinite("step 7, update 1 of 1: the weight is inf")
    error.place = (0, 1, 2)
    with pytest.raises(NonFinite) as raised:
        train(FailingLearner(error), tmp_path, keeps_all=False)
    path = tmp_path / "batches" / "failed_step_7.npz"
    assert f"the weight is inf\n  what the learner was given is in {path}" in str(raised.value)
    assert f"covey replay {tmp_path} 7" in str(raised.value)
    assert read_batch(path).outcome == Outcome(error=str(error), place=(0, 1, 2))


@pytest.mark.parametrize("error", [OutOfMemory("no room"), Fatal("the learner is lost")])
def test_a_batch_is_kept_however_the_learner_failed(tmp_path: Path, error: Fatal) -> None:
    with pytest.raises(type(error), match="covey replay"):
        train(FailingLearner(error), tmp_path, keeps_all=True)
    assert names(tmp_path) == ["failed_step_7.npz"]


@pytest.mark.parametrize(("keeps_all", "left"), [(True, ["step_7.npz"]), (False, [])])
def test_a_step_that_succeeds_at_last_replaces_its_failure(
    tmp_path: Path, keeps_all: bool, left: list[str]
) -> None:
    with pytest.raises(Fatal):
        train(FailingLearner(Fatal("lost")), tmp_path, keeps_all=keeps_all)
    drop_later(tmp_path, 5)  # resuming leaves the evidence
    assert names(tmp_path) == ["failed_step_7.npz"]
    train(FakeLearner(), tmp_path, keeps_all=keeps_all)
    assert names(tmp_path) == left


def test_a_loss_keeps_the_name_of_what_was_lost(tmp_path: Path) -> None:
    lost = StateLost("the learner is lost: killed")
    lost.owner = "learner rank 1"
    with pytest.raises(StateLost) as caught:
        train(FailingLearner(lost), tmp_path, keeps_all=True)
    assert caught.value.owner == "learner rank 1"


def test_the_learner_s_failure_is_heard_even_if_its_batch_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "batches").write_text("a file where a folder should be")
    with pytest.raises(NonFinite, match=r"(?s)the weight is inf\n.*could not be saved"):
        train(FailingLearner(NonFinite("the weight is inf")), tmp_path, keeps_all=True)
