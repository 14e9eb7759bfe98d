"""Whole runs in one process, as a user starts them: stopping, resuming, overlapping."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from orchestration.starter.data import write_datasets
from tests.end_to_end.runs import covey, finished, lines_until, only_run, train

pytestmark = pytest.mark.slow


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_continues_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    """Rewards must be equal; norms up to what other memory addresses do to float32 sums."""
    whole = train(tmp_path / "whole", "--local", steps=6, data__evaluation=None)
    assert whole.wait() == 0, finished(whole)
    first = train(tmp_path / "parts", "--local", steps=6, data__evaluation=None)
    lines_until(first, "step 3/6")
    first.send_signal(signal.SIGINT)
    output = finished(first)
    assert first.returncode == 1
    assert "continue with" in output
    left = only_run(tmp_path / "parts" / "runs")
    assert left.summary["status"] == "interrupted"
    stopped_at = len(left.steps)
    assert 3 <= stopped_at < 6
    second = covey("train", "--resume", str(left.path), "--local")
    output = finished(second)
    assert second.returncode == 0, output
    expected = only_run(tmp_path / "whole" / "runs")
    assert [s["step"] for s in left.steps] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(expected.steps, left.steps, strict=True):
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert [g["group"] for g in expected.groups] == [g["group"] for g in left.groups]


def test_a_run_keeps_the_batches_since_its_oldest_checkpoint_and_they_replay(
    tmp_path: Path,
) -> None:
    run = train(tmp_path, "--local", steps=5, data__evaluation=None, checkpoint__every=2)
    text = finished(run)
    assert run.returncode == 0, text
    left = only_run(tmp_path / "runs")
    # Checkpoints 4 and 5 are kept; the one of step 2 and what preceded it are gone.
    assert sorted(path.name for path in (left.path / "batches").iterdir()) == ["step_5.npz"]
    replay = covey("replay", str(left.path), "5")
    text = finished(replay)
    assert replay.returncode == 0, text
    assert "bit for bit equal: step 5 from step_4" in text
    for name in ("mean", "max", "kl"):
        assert all(f"log_prob_gap/{name}" in step for step in left.steps)


def test_dapo_and_dr_grpo_recipes_train_overlapped(tmp_path: Path) -> None:
    data = write_datasets(tmp_path / "data", num_train=400, num_heldout=60)
    for name in ("dapo", "dr_grpo"):
        output = tmp_path / name
        run = covey(
            "train",
            f"recipes/{name}.yaml",
            "--local",
            *("--set", f"output={output}"),
            *("--set", "steps=2"),
            *("--set", "learner.warmup_steps=0"),
            *("--set", f"data.train={data.train}"),
            *("--set", f"data.evaluation={data.heldout}"),
            *("--set", "max_staleness=1"),
            *("--set", "evaluation.prompts=4"),
            *("--set", "evaluation.samples=1"),
        )
        text = finished(run)
        assert run.returncode == 0, text
        assert len(only_run(output).steps) == 2
