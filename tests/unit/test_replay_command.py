"""`covey replay` on runs of the plain torch learner: equal bits, named tokens, clear refusals."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grpo.errors import NonFinite
from grpo.types import TrainBatch, TrainRow
from orchestration.batch_files import BATCHES, read_batch, write_batch
from orchestration.checkpoint import DriverState, begin_checkpoint, complete_checkpoint
from orchestration.cli import main
from orchestration.config import Recipe
from orchestration.recording import RecordingLearner
from orchestration.roles import started_learner
from orchestration.run_directory import CONFIG_FILE, VERSIONS_FILE
from tests.unit.learner_cases import batch_of, random_rows, write_model

STEPS, SAVED = 5, 3


def a_recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "replayed",
            "model": str(folder / "model"),
            "steps": STEPS,
            "data": {"train": "gone.jsonl"},
            "algorithm": {"name": "grpo", "num_generations": 4, "beta": 0.1},
            "scorers": [{"name": "answer", "rule": "exact"}],
            "learner": {
                "backend": "torch",
                "learning_rate": 1e-2,
                "lr_scheduler_type": "linear",
                "max_tokens_per_microbatch": 64,
            },
            **changes,
        }
    )


async def record(
    run: Path, recipe: Recipe, batches: Sequence[TrainBatch], *, keeps_all: bool = True
) -> None:
    """Train on the batches as a run does; a checkpoint after step SAVED."""
    async with started_learner(recipe, on_phase=lambda _: None) as learner:
        recording = RecordingLearner(
            learner,
            run,
            total_steps=recipe.steps,
            settings={"max_tokens_per_microbatch": recipe.learner.max_tokens_per_microbatch},
            keeps_all=keeps_all,
        )
        for batch in batches:
            rows = [row for update in batch.updates for row in update]
            values = await learner.log_probs(rows)
            known = {
                id(row): replace(row, behaviour_log_probs=np.asarray(v, np.float32))
                for row, v in zip(rows, values, strict=True)
            }
            updates = tuple(tuple(known[id(row)] for row in u) for u in batch.updates)
            await recording.train(replace(batch, updates=updates))
            if batch.step == SAVED:
                state = DriverState(step=SAVED, version=SAVED, seed=0, next_group=0)
                draft = await begin_checkpoint(run, SAVED, learner, {})
                await complete_checkpoint(draft, learner, state)


def batches(count: int = STEPS) -> list[TrainBatch]:
    """Two updates over two epochs in each step."""
    found = []
    for step in range(1, count + 1):
        rows = random_rows(12, seed=step, version=step - 1)
        epoch = (rows[:8], rows[8:])
        found.append(batch_of(*epoch, *epoch, step=step, version=step - 1))
    return found


def begun(folder: Path, **changes: Any) -> Path:
    """A run folder before its first step."""
    write_model(folder / "model")
    run = folder / "run"
    run.mkdir()
    settings = a_recipe(folder, **changes).model_dump(mode="json")
    (run / CONFIG_FILE).write_text(yaml.safe_dump(settings))
    (run / VERSIONS_FILE).write_text("{}")
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    run = begun(folder)
    asyncio.run(record(run, a_recipe(folder), batches()))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its model is the one beside it."""
    shutil.copytree(original, tmp_path / "copy")
    path = tmp_path / "copy" / "run"
    text = (path / CONFIG_FILE).read_text()
    (path / CONFIG_FILE).write_text(text.replace(str(original), str(tmp_path / "copy")))
    return path


def replayed(
    capsys: pytest.CaptureFixture[str], run: Path, step: int
) -> tuple[int, dict[str, Any]]:
    status = main(["replay", str(run), str(step), "--json"])
    return status, json.loads(capsys.readouterr().out)


def with_rows(run: Path, step: int, change: Callable[[TrainRow], TrainRow]) -> None:
    """Change the first row of a recorded batch, wherever it comes."""
    path = run / BATCHES / f"step_{step}.npz"
    recorded = read_batch(path)
    first = recorded.batch.updates[0][0]
    changed = change(first)
    updates = tuple(
        tuple(changed if row is first else row for row in update)
        for update in recorded.batch.updates
    )
    write_batch(run, replace(recorded, batch=replace(recorded.batch, updates=updates)))


def test_steps_after_a_checkpoint_come_out_bit_for_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = replayed(capsys, run, STEPS)
    assert (status, found["is_equal"], found["start"]) == (0, True, f"step_{SAVED}")
    assert [batch["step"] for batch in found["batches"]] == [4, 5]
    last = found["batches"][-1]
    assert last["recorded"]["metrics"] == last["recomputed"]["metrics"]
    assert last["recomputed"]["metrics"]["grad_norm"] > 0


def test_the_first_steps_come_out_from_the_initial_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(run), "2"]) == 0
    shown = capsys.readouterr()
    assert "bit for bit equal: step 2 from the initial model, every figure of 2 bat" in shown.out
    assert "recorded" in shown.out and "log_prob_gap/kl" in shown.out
    assert "step 2/2" in shown.err  # progress, apart from the result


def with_learner(run: Path, **changes: Any) -> None:
    """Resumed with other settings, as config.yaml has them afterwards."""
    settings = yaml.safe_load((run / CONFIG_FILE).read_text())
    settings["learner"] |= changes
    (run / CONFIG_FILE).write_text(yaml.safe_dump(settings))


def test_a_step_is_done_again_with_the_settings_that_it_had(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_learner(run, max_tokens_per_microbatch=40)
    assert replayed(capsys, run, STEPS)[1]["is_equal"]
    with_learner(run, learning_rate=2e-2)  # what is not recorded is the recipe's
    assert not replayed(capsys, run, STEPS)[1]["is_equal"]


def test_steps_that_had_other_settings_than_the_last_are_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / BATCHES / "step_5.npz"
    write_batch(run, replace(read_batch(path), learner={"max_tokens_per_microbatch": 40}))
    _, found = replayed(capsys, run, STEPS)
    assert (
        "it was taken with learner.max_tokens_per_microbatch 64, step 5 with "
        "learner.max_tokens_per_microbatch 40" in found["reasons"][1]
    )


def test_a_stage_is_done_again_with_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"algorithm": {"name": "veripo", "num_generations": 4}}
    run = begun(tmp_path, **changes)
    first, second = batches(2)
    pairs = [  # the better row of each comes first
        replace(row, advantages=np.full_like(row.advantages, 1 - 2 * (row.index % 2)))
        for row in first.updates[0]
    ]
    stage = replace(batch_of(pairs, step=1, version=1), is_stage=True)
    asyncio.run(record(run, a_recipe(tmp_path, **changes), [first, stage, second]))
    status, found = replayed(capsys, run, 2)
    assert (status, [batch["is_stage"] for batch in found["batches"]]) == (0, [False, True, False])
    (run / BATCHES / "step_1_stage.npz").unlink()  # without it the second step is another one
    assert replayed(capsys, run, 2)[0] == 1


def test_a_changed_batch_differs_from_its_step_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_rows(run, 4, lambda row: replace(row, advantages=row.advantages * np.float32(1.001)))
    status, found = replayed(capsys, run, STEPS)
    assert (status, found["is_equal"]) == (1, False)
    assert found["reasons"][0].startswith("the first to differ is step 4, in ")
    assert "grad_norm" in found["batches"][0]["differing"]
    assert len(found["reasons"]) == 1  # the weights are the right ones


def test_a_model_that_changed_since_is_told_from_rounding(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(run.parent / "model", seed=1)
    assert main(["replay", str(run), "1"]) == 1
    assert "the weights of the initial model are not those that the run had" in (
        capsys.readouterr().out
    )


def test_a_checkpoint_that_changed_since_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / f"step_{SAVED}" / "learner" / "rank_0.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert main(["replay", str(run), str(STEPS)]) == 2
    assert "is not what the run wrote: the contents of learner/rank_0.safetensors have changed" in (
        capsys.readouterr().err
    )


def test_what_cannot_be_replayed_says_why(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / BATCHES / "step_2.npz").unlink()
    refusals = {
        ("nowhere", "1"): "nowhere: there is no such run",
        (str(tmp_path), "1"): "is no run folder: it holds no config.yaml",
        (str(run), "9"): "step 9 of",
        (str(run), "2"): "those since the oldest checkpoint are: steps 1 and 3 to 5",
        (str(run), "3"): "from the initial model on it needs all steps before it, but step 2 is",
    }
    for arguments, said in refusals.items():
        assert main(["replay", *arguments]) == 2
        assert said in capsys.readouterr().err
    shutil.rmtree(run / BATCHES)
    assert main(["replay", str(run), "1"]) == 2
    assert "no step is: checkpoint.record_batches was false" in capsys.readouterr().err


def spoilt(batch: TrainBatch) -> TrainBatch:
    """The advantage of token 1 of one rollout is no number."""
    rows = list(batch.updates[0])
    place = next(i for i, row in enumerate(rows) if row.weights[1:2].any())
    advantages = rows[place].advantages.copy()
    advantages[1] = np.nan
    rows[place] = replace(rows[place], advantages=advantages, group=70, index=3)
    return replace(batch, updates=(tuple(rows),))


def test_a_step_that_failed_shows_its_token_and_fails_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path)
    with pytest.raises(NonFinite, match=f"covey replay {run} 3"):
        asyncio.run(record(run, a_recipe(tmp_path), [*batches(2), spoilt(batches(3)[2])]))
    status, found = replayed(capsys, run, 3)
    assert (status, found["is_equal"]) == (0, True)
    assert "the advantage is nan at completion token 1" in found["batches"][-1]["recorded"]["error"]
    faulty = found["faulty_token"]
    assert (faulty["group"], faulty["rollout"], faulty["token"]) == (70, 3, 1)
    (given,) = [given for given in faulty["nearby"] if given["token"] == 1]
    assert np.isnan(given["advantage"]) and given["weight"] > 0
    assert main(["replay", str(run), "3"]) == 0
    shown = capsys.readouterr().out
    assert "token 1 of rollout 3 of group 70" in shown
    assert "fails as it did in the run: step 3 from the initial model" in shown


def test_a_failure_without_recorded_steps_still_says_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path)
    steps = [*batches(2), spoilt(batches(3)[2])]
    with pytest.raises(NonFinite):
        asyncio.run(record(run, a_recipe(tmp_path), steps, keeps_all=False))
    assert main(["replay", str(run), "3"]) == 2
    said = capsys.readouterr().err
    assert "steps 1 to 2 are not recorded (checkpoint.record_batches: true keeps them)" in said
    assert "what the run said of it: step 3, update 1 of 1: the advantage is nan" in said
