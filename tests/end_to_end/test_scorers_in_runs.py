"""Whole runs whose scorers fail, hang or learn: groups are scored or dropped with the reason."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from grpo.errors import Fatal
from orchestration.config import Recipe
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from tests.fakes import FakeJournal
from tests.real_driver import real_driver
from tests.unit.small_project import MODEL

# Which trouble is told by the text of the prompt, so that it stays however often it is tried.
# What is well is 5 or 6, so a 0 can only have come from a failure.
SOURCE = """
import os, signal, threading, time, zlib
def reward(prompts, completions, **kwargs):
    trouble = zlib.crc32(prompts[0].encode()) % 12
    if trouble == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == 1:
        threading.Event().wait()
    if trouble == 2:
        raise OSError("busy")
    if trouble == 3:
        return [float("nan")] * len(completions)
    if trouble == 4:
        return [0.0] * (len(completions) + 1)
    if trouble == 5:
        time.sleep(1.5)
        return [0.0] * len(completions)
    return [5.0 + ("1" in c) for c in completions]
"""
REASONS = [
    "died with exit status -9", "within 1 s", "OSError: busy", "returned nan", "expected one each",
]  # fmt: skip


def a_recipe(folder: Path, scorers: list[dict[str, object]], **changes: object) -> Recipe:
    data = write_datasets(folder / "data", num_train=200, num_heldout=10)
    settings = {
        "name": "scorers",
        "model": str(MODEL),
        "steps": 2,
        "num_prompts_per_step": 8,
        "sampling": {"max_completion_length": 24, "max_prompt_length": 40},
        "data": {"train": str(data.train)},
        "algorithm": {"name": "grpo", "num_generations": 4},
        "scorers": scorers,
        "learner": {"learning_rate": 1e-4},
        **changes,
    }
    return local_recipe(Recipe.model_validate(settings))


def run(recipe: Recipe) -> FakeJournal:
    journal = FakeJournal()

    async def driven() -> None:
        waits = Waits()
        async with started_roles(
            recipe, local=True, waits=waits, on_phase=lambda name: None
        ) as roles:
            await real_driver(recipe, roles, journal).run()

    asyncio.run(driven())
    return journal


def a_troubled_scorer(folder: Path, **settings: object) -> dict[str, object]:
    file = folder / "rewards.py"
    file.write_text(SOURCE)
    place = {"name": "mine", "function": f"{file}:reward"}
    return {**place, "deadline_s": 1, "retries": 1, "batch_size": 4, "max_wait_ms": 0, **settings}


def test_a_run_goes_on_whatever_its_scorer_does_and_no_reward_becomes_0(tmp_path: Path) -> None:
    journal = run(a_recipe(tmp_path, [a_troubled_scorer(tmp_path)]))
    trained = [done.group for step in journal.steps for done in step.groups]
    assert len(journal.steps) == 2 and len(trained) == 16
    values = [score.value for group in trained for score in group.scores]
    assert {*values} <= {5.0, 6.0}
    details = [fallen.dropped.detail for fallen in journal.fallen]
    assert details and {fallen.dropped.reason for fallen in journal.fallen} == {"failed_score"}
    for fallen in journal.fallen:
        assert any(reason in fallen.dropped.detail for reason in REASONS), fallen.dropped.detail
        assert {score.value for score in fallen.group.scores} <= {None, 5.0, 6.0}
    assert sum(reason in "\n".join(details) for reason in REASONS) >= 3, details


def test_a_run_ends_when_a_scorer_fails_more_groups_than_the_recipe_allows(
    tmp_path: Path,
) -> None:
    recipe = a_recipe(tmp_path, [a_troubled_scorer(tmp_path, max_failure_rate=0.01)], steps=8)
    with pytest.raises(BaseException) as caught:
        run(recipe)
    found = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Fatal)
    assert "scorer 'mine' failed" in str(found) and "max_failure_rate is 0.01" in str(found)


def test_an_implicit_reward_learns_in_every_step_of_a_run(tmp_path: Path) -> None:
    implicit = {"model": str(MODEL), "outcome": "answer", "learning_rate": 1e-4}
    scorers: list[dict[str, object]] = [
        {"name": "answer", "rule": "numeric"},
        {"name": "prime", "implicit_reward": implicit, "weight": 0.1},
    ]
    journal = run(a_recipe(tmp_path, scorers))
    first, second = (
        [s.value for done in step.groups for s in done.group.scores if s.scorer == "prime"]
        for step in journal.steps
    )
    assert set(first) == {0.0}, "the model is its reference before anything is learned"
    assert None not in second and any(value != 0 for value in second)
    for step in journal.steps:
        assert step.metrics["scorers/prime/num_rollouts"] == 32
        assert step.metrics["scorers/prime/loss"] > 0
