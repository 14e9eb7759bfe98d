"""The phase clock and the places that metrics go to."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.errors import UserError
from orchestration.run_directory import RunDirectory
from orchestration.telemetry import PhaseClock, Telemetry, idle_shares


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    now = datetime(2026, 1, 2, 3, 4, 5)
    return RunDirectory.create(tmp_path, "demo", now=now, config={}, versions={})


def test_a_phase_that_two_tasks_are_in_counts_once() -> None:
    time = Clock()
    clock = PhaseClock(time)
    first, second = clock.phase("sampling"), clock.phase("sampling")
    first.__enter__()
    time.time = 2.0
    second.__enter__()
    time.time = 5.0
    first.__exit__(None, None, None)
    time.time = 6.0
    second.__exit__(None, None, None)
    time.time = 9.0
    assert clock.lap() == {"sampling": 6.0}  # not 5 + 4


def test_a_phase_in_progress_is_shared_out_over_the_laps() -> None:
    time = Clock()
    clock = PhaseClock(time)
    with clock.phase("sampling"):
        time.time = 2.0
        assert clock.lap() == {"sampling": 2.0}
        time.time = 5.0
    assert clock.lap() == {"sampling": 3.0}
    assert clock.lap() == {}
    assert clock.totals == {"sampling": 5.0}


def test_a_phase_that_fails_is_counted_too() -> None:
    time = Clock()
    clock = PhaseClock(time)
    with pytest.raises(RuntimeError), clock.phase("train"):
        time.time = 3.0
        raise RuntimeError
    assert clock.lap() == {"train": 3.0}


def test_idle_shares_are_what_the_roles_did_not_work() -> None:
    metrics = {"timing_s/step": 4.0, "timing_s/train": 1.0}
    assert idle_shares(metrics, {"sampling": 3.0}) == {"idle/rollout": 0.25, "idle/learner": 0.75}
    assert idle_shares(metrics, {})["idle/rollout"] == 1.0


def scalars(run: RunDirectory, name: str) -> dict[int, float]:
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_metrics_reach_the_file_and_tensorboard(run: RunDirectory) -> None:
    telemetry = Telemetry.open(run, ["tensorboard"], config={})
    telemetry.log(1, {"reward": 0.5})
    telemetry.log(2, {"reward": 0.75, "kl": 0.25})
    assert scalars(run, "reward") == {1: 0.5, 2: 0.75}  # before it is closed
    telemetry.close()
    last = (run.path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 2, "reward": 0.75, "kl": 0.25}


def test_tensorboard_forgets_the_steps_that_a_resumed_run_does_again(run: RunDirectory) -> None:
    telemetry = Telemetry.open(run, ["tensorboard"], config={})
    for step in (1, 2, 3, 4):
        telemetry.log(step, {"reward": float(step)})
    telemetry.close()
    resumed = Telemetry.open(run, ["tensorboard"], config={}, resumed_step=2)
    resumed.log(3, {"reward": -3.0})
    resumed.close()
    assert scalars(run, "reward") == {1: 1.0, 2: 2.0, 3: -3.0}


def test_a_run_that_is_turned_back_tells_its_trackers(run: RunDirectory) -> None:
    telemetry = Telemetry.open(run, ["tensorboard"], config={})
    for step in (1, 2, 3):
        telemetry.log(step, {"reward": float(step)})
    telemetry.turn_back(1)
    telemetry.log(2, {"reward": -2.0})
    telemetry.close()
    assert scalars(run, "reward") == {1: 1.0, 2: -2.0}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_says_how_to_install_it(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="pip install wandb"):
        Telemetry.open(run, ["wandb"], config={})


def test_the_run_side_loads_no_engine_and_no_torch() -> None:
    modules = "run_directory, records, checkpoint, resume, telemetry, display, evaluation, versions"
    heavy = "{'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'tensorflow'}"
    code = f"import sys; from orchestration import {modules}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
