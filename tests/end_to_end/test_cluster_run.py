"""Whole runs through Ray with the real vLLM, scorers and DeepSpeed, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.runs import MODEL, covey, finished, lines_until, only_run, train

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_starter_model_learns_and_engine_and_learner_agree_in_every_step(
    tmp_path: Path,
) -> None:
    run = train(tmp_path, steps=16, evaluation__samples=2)
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")
    assert left.pass_at_1("after") > left.pass_at_1("before") + 0.15, output
    assert len(left.steps) == 16
    assert max(step["log_prob_gap/max"] for step in left.steps) < 1e-4
    assert left.summary["status"] == "finished"
    trained = [group for group in left.groups if "dropped" not in group]
    assert [group["group"] for group in trained] == list(range(16 * 8))
    exported = left.path / "checkpoints" / "step_16" / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(exported)
    before = AutoModelForCausalLM.from_pretrained(MODEL)
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert min(moved) > 0
    assert AutoTokenizer.from_pretrained(exported).chat_template


def untied_model(folder: Path) -> Path:
    """The starter model with an output layer of its own."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def test_two_zero_3_ranks_and_an_untied_model_agree_with_the_engine(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        model=untied_model(tmp_path / "untied"),
        steps=3,
        data__evaluation=None,
        checkpoint__every=2,
        learner__ranks=2,
        learner__zero_stage=3,
    )
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")
    steps = left.steps
    assert len(steps) == 3
    assert max(step["log_prob_gap/max"] for step in steps) < 1e-4
    replay = covey("replay", str(left.path), "3")  # from the checkpoint of step 2, on two ranks
    output = finished(replay)
    assert replay.returncode == 0, output
    assert "bit for bit equal: step 3 from step_2" in output


def test_measures_epochs_and_replay_on_two_ranks(tmp_path: Path) -> None:
    run = train(
        tmp_path,
        steps=3,
        algorithm={"name": "rloo", "num_generations": 4, "kl_in_reward": 0.1},
        epochs_per_step=2,
        replay={"share": 0.25, "steps": 2},
        data__evaluation=None,
        learner__ranks=2,
    )
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")
    assert [step["replay/share"] for step in left.steps] == [0.0, 0.25, 0.25]
    assert {step["rewards/kl_to_reference/mean"] != 0 for step in left.steps[1:]} == {True}
    assert all("scorers/answer/hit_rate" in step for step in left.steps)
    trained = [group for group in left.groups if "dropped" not in group]
    for rollout in (r for group in trained for r in group["rollouts"]):
        assert "reference" in rollout["measured"]
    assert sum("replayed" in group for group in trained) == 4


def rollout_workers(run: subprocess.Popen[str]) -> list[int]:
    """Their process ids."""
    return [
        process.pid
        for process in psutil.Process(run.pid).children(recursive=True)
        if "RolloutWorker" in " ".join(process.cmdline())
    ]


def test_a_killed_rollout_worker_is_replaced_and_no_group_is_lost(tmp_path: Path) -> None:
    run = train(tmp_path, steps=8, max_staleness=1, data__evaluation=None)
    lines_until(run, "step 2/8")
    (worker,) = rollout_workers(run)
    os.kill(worker, signal.SIGKILL)
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")
    trained = [group["group"] for group in left.groups if "dropped" not in group]
    assert trained == list(range(64))
    assert max(step["staleness/max"] for step in left.steps) <= 1
    assert left.summary["replaced"] == {"rollout worker": 1}


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_weights_go_straight_to_whoever_is_left(transport: str, tmp_path: Path) -> None:
    run = train(
        tmp_path,
        steps=8,
        max_staleness=1,
        data__evaluation=None,
        rollout__workers=2,
        rollout__weight_transport=transport,
    )
    lines_until(run, "step 3/8")
    victim, _ = rollout_workers(run)
    os.kill(victim, signal.SIGKILL)
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")
    trained = [group["group"] for group in left.groups if "dropped" not in group]
    assert trained == list(range(64))
    assert max(step["log_prob_gap/max"] for step in left.steps) < 1e-4
    assert left.summary["replaced"] == {"rollout worker": 1}
    # A phase of the object store alone: nobody had weights at the first sync.
    by_store = ["timing_s/sync/load/transfer" in step for step in left.steps]
    assert not by_store[1] and not by_store[-1], output
