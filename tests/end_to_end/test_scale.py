"""covey scale on a run that goes on: up and down three times, and no group is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import RunFolder, covey, finished, lines_until, only_run, train

# Seven commands and as many starts of workers: three minutes where a start takes 20 s.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def scale(run: Path, *sizes: str) -> tuple[int, str]:
    """Exit status and answer."""
    process = covey("scale", str(run), *sizes)
    answer = finished(process)
    return process.returncode, answer


def test_a_run_is_scaled_up_and_down_three_times_and_loses_nothing(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        steps=100_000,
        max_staleness=1,
        rollout__engine="transformers",
        learner__backend="torch",
        data__evaluation=None,
        checkpoint__keep=1,
    )
    lines_until(run, "step 1/")
    left = only_run(tmp_path / "runs").path
    status, answer = scale(left, "rollout=100001")
    assert status == 2, answer
    assert "rollout=100001 does not fit: 200000 CPUs and 0 GPUs more are needed" in answer
    for sizes in (
        ("rollout=2", "answer=2"),
        ("rollout=1",),
        ("rollout=3", "answer=1"),
        ("rollout=2",),
        ("rollout=4",),
        ("rollout=2", "answer=2"),
    ):
        status, answer = scale(left, *sizes)
        assert status == 0, answer
        assert f"in force: {' '.join(sizes)}" in answer
        lines_until(run, "step ")  # and goes on
    status, answer = scale(left)
    assert status == 0
    assert [line.split() for line in answer.splitlines()] == [
        ["role", "wanted", "ready", "starting", "leaving"],
        ["rollout", "2", "2", "0", "0"],
        ["answer", "2", "2", "0", "0"],
        ["learner", "1", "1", "0", "0"],
    ]
    run.terminate()
    output = finished(run)
    assert run.returncode == 1, output
    status, answer = scale(left, "rollout=1")
    assert status == 2
    assert "is not running (interrupted)" in answer
    steps = RunFolder(left).summary["steps"]
    resumed = covey("train", "--resume", str(left), "--set", f"steps={int(str(steps)) + 2}")
    output = finished(resumed)
    assert resumed.returncode == 0, output
    assert "sizes as last asked for with covey scale: rollout=2 answer=2" in output
    assert RunFolder(left).summary["replaced"] == {}
    doctor = covey("doctor", str(left))
    answer = finished(doctor)
    assert doctor.returncode == 0, answer
    assert "none lost, none twice, in the planned order" in answer
