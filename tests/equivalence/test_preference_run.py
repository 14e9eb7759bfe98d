"""Both phases of WS-GRPO from one recipe: collect, train, and two optimiser steps by the driver."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import UserError
from orchestration import preference_phase
from orchestration.config import Recipe
from orchestration.driver import TrainedStep
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from reward_services.preference.questions import Collection, read_collection, write_collection
from tests.fakes import FakeJournal
from tests.real_driver import real_driver
from tests.unit.small_project import MODEL

STEPS, MAX_TOKENS = 2, 48


def a_recipe(folder: Path) -> Recipe:
    data = write_datasets(folder / "data", num_train=40, num_heldout=10)
    return local_recipe(
        Recipe.model_validate(
            {
                "name": "both-phases",
                "model": str(MODEL),
                "steps": STEPS,
                "num_prompts_per_step": 2,
                "sampling": {"max_completion_length": MAX_TOKENS, "max_prompt_length": 40},
                "data": {"train": str(data.train), "evaluation": str(data.heldout)},
                "algorithm": {
                    "name": "ws_grpo",
                    "num_generations": 4,
                    "preference_scorer": "preference",
                    "min_step_chars": 1,
                },
                "scorers": [
                    {"name": "answer", "rule": "numeric", "require_marker": True},
                    {
                        "name": "preference",
                        "weight": 0,
                        "preference": {
                            "folder": str(folder / "preference"),
                            "num_questions": 30,
                            "validation_share": 0.3,
                        },
                    },
                ],
                "learner": {"learning_rate": 1e-3},
            }
        )
    )


async def driven(recipe: Recipe) -> list[TrainedStep]:
    journal = FakeJournal()
    async with started_roles(recipe, local=True, waits=Waits(), on_phase=lambda _: None) as roles:
        await real_driver(recipe, roles, journal).run()
    return journal.steps


def test_one_recipe_makes_its_preference_model_and_trains_by_it(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)
    parts = preference_phase.preference_parts(recipe)
    assert not preference_phase.is_trained(parts)
    found = preference_phase.collect(parts, lambda _: None)
    assert (found.num_questions, found.num_rollouts) == (30, 240)
    questions, _ = read_collection(parts.folder)
    assert sum(r.is_right for q in questions for r in q.rollouts) == found.num_right > 0
    assert all(len(r.tokens) <= MAX_TOKENS for q in questions for r in q.rollouts)
    report = preference_phase.train(parts, lambda _: None)
    assert preference_phase.is_trained(parts) and report.num_pairs > 0
    assert preference_phase.evaluate(parts, lambda _: None).num_questions <= 10

    steps = asyncio.run(driven(recipe))
    assert [step.metrics["steps/mean"] > 0 for step in steps] == [True, True]
    for step in steps:
        assert 0 < step.metrics["rewards/step_preference/mean"] < 1
        assert np.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0
        for done in step.groups:
            judged = [s for s in done.group.scores if s.scorer == "preference"]
            assert {s.span.rollout for s in judged if s.span.end == 0} <= {0, 1, 2, 3}
            assert all(s.value is not None and s.span.start == 0 for s in judged)


def test_answers_that_are_missing_or_of_another_model_are_not_learned_from(tmp_path: Path) -> None:
    parts = preference_phase.preference_parts(a_recipe(tmp_path))
    with pytest.raises(UserError, match="holds no labelled rollouts"):
        preference_phase.train(parts, lambda _: None)
    facts = Collection(
        model="other",
        weights="0" * 64,
        tokenizer="0" * 64,
        num_questions=0,
        num_rollouts=0,
        num_right=0,
        num_dropped=0,
    )
    write_collection(parts.folder, [], facts)
    with pytest.raises(UserError, match=r"are those of other .*covey preference collect"):
        preference_phase.train(parts, lambda _: None)


def test_a_recipe_without_a_preference_model_is_told_what_is_missing(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)
    without = recipe.model_copy(update={"scorers": recipe.scorers[:1]})
    with pytest.raises(UserError, match="0 preference models and 1 other"):
        preference_phase.preference_parts(without)
