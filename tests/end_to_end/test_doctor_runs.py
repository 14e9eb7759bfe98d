"""covey doctor on real runs: one that is killed and resumed, one whose learner hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestration.waits_file import read_waits
from tests.end_to_end.runs import covey, finished, lines_until, only_run, train

pytestmark = pytest.mark.slow


def doctor(run: Path) -> tuple[int, str]:
    """Exit status and answer."""
    process = covey("doctor", str(run))
    answer = finished(process)
    return process.returncode, answer


def test_a_killed_run_is_told_and_after_its_resume_the_ledger_holds(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        "--local",
        steps=10_000,  # it must not end while the doctor looks at it
        max_staleness=1,
        checkpoint__every=2,
        data__evaluation=None,
    )
    lines_until(run, "step 3/10000")
    left = only_run(tmp_path / "runs").path
    status, answer = doctor(left)
    run.kill()
    finished(run)
    assert status == 0, answer
    assert ": running, step " in answer
    assert "closest to its deadline: the run -> " in answer
    status, answer = doctor(left)
    assert status == 1
    assert ": crashed, step " in answer
    assert "continues from step " in answer
    assert "none lost, none twice, in the planned order" in answer
    steps = int(answer.partition("continues from step ")[2].split()[0]) + 2
    resumed = covey("train", "--resume", str(left), "--local", "--set", f"steps={steps}")
    output = finished(resumed)
    assert resumed.returncode == 0, output
    status, answer = doctor(left)
    assert status == 0, answer
    assert f": finished, step {steps} of {steps}" in answer
    assert f"ledger: {8 * steps} groups trained on" in answer
    assert "none lost, none twice, in the planned order" in answer


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_steps_it_is_given(
    tmp_path: Path,
) -> None:
    run = train(tmp_path, "--local", steps=100, checkpoint__every=50, data__evaluation=None)
    lines_until(run, "step 2/100")
    run.kill()
    finished(run)
    left = only_run(tmp_path / "runs").path
    _, answer = doctor(left)
    assert "it had no checkpoint yet" in answer
    resumed = covey("train", "--resume", str(left), "--local", "--set", "steps=3")
    output = finished(resumed)
    assert resumed.returncode == 0, output
    status, answer = doctor(left)
    assert status == 0, answer
    assert ": finished, step 3 of 3" in answer
    assert "ledger: 24 groups trained on" in answer


@pytest.mark.ray
def test_a_learner_rank_that_hangs_is_named_by_the_run_and_by_the_doctor(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        steps=10_000,
        rollout__engine="transformers",
        learner__backend="torch",
        data__evaluation=None,
        alarms__worker_s=20,  # generous for a machine with other load
        alarms__stall_s=25,
    )
    lines_until(run, "step 50/10000")  # longer than waits.json lags behind
    left = only_run(tmp_path / "runs").path
    waits = read_waits(left)
    assert waits is not None
    assert {"scorer answer 0", "learner rank 0"} <= set(waits.workers)
    os.kill(waits.workers["learner rank 0"].pid, signal.SIGSTOP)
    output = finished(run)
    assert run.returncode == 1
    (message,) = [line for line in output.splitlines() if line.startswith("covey: ")]
    assert message.startswith("covey: learner rank 0 has not answered for 25.")
    status, answer = doctor(left)
    assert status == 1
    assert "WRONG: the run failed: learner rank 0 has not answered for 25." in answer


@pytest.mark.ray
def test_a_rollout_worker_and_a_scorer_that_hang_are_named_and_replaced(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        steps=10_000,
        rollout__engine="transformers",
        rollout__cpus_per_worker=1,
        rollout__workers=2,
        learner__backend="torch",
        data__evaluation=None,
        alarms__worker_s=20,
    )
    lines_until(run, "step 50/10000")  # longer than waits.json lags behind
    left = only_run(tmp_path / "runs").path
    for worker in ("rollout worker 1", "scorer answer 0"):
        waits = read_waits(left)
        assert waits is not None
        os.kill(waits.workers[worker].pid, signal.SIGSTOP)
        told = lines_until(run, f"{worker} ")
        assert "has not answered for 2" in told[-1], told[-1]
        lines_until(run, "step ")
    run.send_signal(signal.SIGINT)
    output = finished(run)
    assert "Traceback" not in output
    status, answer = doctor(left)
    assert status == 0, answer
    assert "none lost, none twice, in the planned order" in answer
