"""Rewards for length: values worked by hand, what they do to wrong answers, degenerate groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo import length_rewards as terms
from grpo.algorithms import ALGORITHMS
from grpo.errors import UserError
from tests.unit.family_cases import halves, points, rows_of
from tests.unit.grpo_groups import rollout, scored

WITH_LENGTHS = [
    name
    for name, algorithm in ALGORITHMS.items()
    if "length_reward" in algorithm.config.model_fields
]
KIND = {
    "kimi": "relative_length",
    "shorter_better": "distance_to_shortest_right",
    "l1_exact": "distance_to_budget",
    "l1_max": "within_budget",
}
JUDGES = {"answer": 1.0}


def lengths(*numbers, right, budget=None):
    group = scored([rollout(i, n) for i, n in enumerate(numbers)], answer=list(right))
    if budget is None:
        return group
    return replace(group, prompt=replace(group.prompt, columns={"token_budget": budget}))


def test_the_relative_length_is_a_bonus_for_right_answers_alone():
    group = lengths(100, 200, 300, 400, right=[1, 0, 1, 0])
    found = terms.relative_length(group, None, weights=JUDGES, coefficient=1.0)
    np.testing.assert_allclose(found, [0.5, 0, -1 / 6, -0.5], atol=1e-12)
    short_and_wrong = lengths(100, 400, right=[0, 1])
    found = terms.relative_length(short_and_wrong, None, weights=JUDGES, coefficient=1.0)
    assert found.tolist() == [0.0, -0.5]


def test_equal_lengths_earn_nothing():
    group = lengths(7, 7, right=[1, 0])
    assert terms.relative_length(group, None, weights=JUDGES, coefficient=1.0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        # shortest right 200: 2 - 0.1, 0 - 0.1, 2 - 0, 0 - 0.15
        ([1, 0, 1, 0], [1.9, -0.1, 2.0, -0.15]),
        # none right: the mean length is 162.5
        ([0, 0, 0, 0], [-0.1375, -0.0625, -0.0375, -0.1125]),
    ],
)
def test_answers_are_drawn_towards_the_shortest_right_one(right, expected):
    group = lengths(300, 100, 200, 50, right=right)
    term = terms.distance_to_shortest_right(group, None, weights=JUDGES, coefficient=0.001)
    np.testing.assert_allclose(2 * np.array(right) + term, expected, atol=1e-12)


def test_missing_the_budget_costs_on_both_sides():
    group = lengths(1500, 1500, 500, right=[1, 0, 1], budget=1000)
    term = terms.distance_to_budget(
        group, None, weights=JUDGES, coefficient=3e-4, column="token_budget"
    )
    np.testing.assert_allclose(np.array([1, 0, 1]) + term, [0.85, -0.15, 0.85], atol=1e-12)


def test_staying_below_the_budget_keeps_more_of_the_reward():
    group = lengths(0, 1000, 2000, 3000, 0, right=[1, 1, 1, 1, 0], budget=1000)
    term = terms.within_budget(group, None, weights=JUDGES, coefficient=3e-4, column="token_budget")
    np.testing.assert_allclose(np.array([1, 1, 1, 1, 0]) + term, [0.8, 0.5, 0.2, 0, 0], atol=1e-12)


def test_the_released_form_of_the_budget_is_half_the_coefficient():
    # (clip(0.0003 (n* - n), -1, 1) + 1) / 2 = clip(0.00015 (n* - n) + 0.5, 0, 1)
    group = lengths(0, 1000, 2000, 3000, 5000, right=[1] * 5, budget=1000)
    term = terms.within_budget(
        group, None, weights=JUDGES, coefficient=1.5e-4, column="token_budget"
    )
    np.testing.assert_allclose(1 + term, [0.65, 0.5, 0.35, 0.2, 0], atol=1e-12)


def test_a_prompt_without_a_budget_is_the_users_mistake():
    with pytest.raises(UserError, match="length_budget_column"):
        terms.distance_to_budget(
            lengths(3, right=[1]), None, weights=JUDGES, coefficient=1.0, column="token_budget"
        )


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_every_length_reward_is_a_term_of_its_own(name, kind):
    rewards = points(name, length_reward=kind)["rewards"]
    assert any(text.startswith(f"{KIND[kind]}(weights={{'answer': 1.0}}") for text in rewards)
    assert not any(text.startswith(KIND[kind]) for text in points(name)["rewards"])


def test_most_members_can_reward_length():
    assert {"grpo", "dr_grpo", "dapo"} <= set(WITH_LENGTHS)


@pytest.mark.parametrize("kind", KIND)
def test_a_rollout_that_nobody_judged_stays_without_a_reward(kind):
    group = lengths(3, 5, 9, right=[1, None, 0], budget=4)
    pipeline, _ = halves("grpo", length_reward=kind)
    assert not rows_of(pipeline, [group])[1].advantages.any()
    term = pipeline.rewards[-1](group, None)
    assert np.isnan(term).tolist() == [False, True, False]
