"""Members whose advantages look at all groups of a step: numbers worked by hand, reductions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo import rewards
from grpo.step_advantage import invariance_weights
from tests.unit.family_cases import advantages_of, differing_points, halves, points
from tests.unit.grpo_groups import random_groups, rollout, scored

ONE = {"answer": 1.0}


def group_of(rewards, *, group=0):
    return scored([rollout(i, 2) for i in range(len(rewards))], group=group, answer=rewards)


def test_the_deviation_of_the_step_divides_every_group():
    # rewards 1, 0, 1, 1: sample deviation 0.5; centred 0.5, -0.5, 0, 0
    groups = [group_of([1, 0]), group_of([1, 1], group=1)]
    found = advantages_of(halves("lite_ppo", std_eps=0)[0], groups)
    np.testing.assert_allclose(found, [1, -1, 0, 0])
    found = advantages_of(halves("lite_ppo", std_eps=0.5)[0], groups)
    np.testing.assert_allclose(found, [0.5, -0.5, 0, 0])


def test_one_group_makes_lite_ppo_grpo_with_a_token_mean():
    (group,) = random_groups(0, num_groups=1, num_generations=4)
    np.testing.assert_allclose(
        advantages_of(halves("lite_ppo")[0], [group]), advantages_of(halves("grpo")[0], [group])
    )
    assert differing_points(points("lite_ppo"), points("grpo")) == {"advantage", "aggregation"}


def test_answers_without_a_reward_are_in_no_deviation_of_the_step():
    groups = [group_of([1, 0, None]), group_of([1, 1], group=1), group_of([None, None], group=2)]
    found = advantages_of(halves("lite_ppo", std_eps=0)[0], groups)
    np.testing.assert_allclose(found, [1, -1, 0, 0, 0, 0, 0])


def objective_value(rewards, is_high, penalty):
    returns = [
        np.sum(share * rewards) / np.sum(share) for share in (is_high, 1 - np.asarray(is_high))
    ]
    return np.mean(rewards) - penalty * np.var(returns)


def test_invariance_weights_are_those_worked_by_hand_and_a_gradient():
    rewards, is_high = np.array([1.0, 2, 3, 6]), np.array([0.1, 0.2, 0.8, 0.9])
    # returns 1.85 and 4.15: variance 1.3225, value 3 - 0.66125
    assert objective_value(rewards, is_high, 0.5) == pytest.approx(2.33875)
    weights = invariance_weights(rewards, is_high, penalty=0.5)
    np.testing.assert_allclose(weights, [1.92, 1.69, 0.31, 0.08])
    step = 1e-6
    for place in range(4):
        moved = rewards + step * np.eye(4)[place]
        slope = objective_value(moved, is_high, 0.5) - objective_value(rewards, is_high, 0.5)
        assert 4 * slope / step == pytest.approx(weights[place], abs=1e-4)


def test_an_empty_half_changes_no_weight():
    for label in (0.0, 1.0):
        found = invariance_weights(np.array([1.0, 5.0]), np.full(2, label), penalty=9.0)
        assert found.tolist() == [1.0, 1.0]


def test_prompts_that_go_badly_weigh_more():
    groups = [group_of([1, 1, 1, 0]), group_of([1, 0, 0, 0], group=1)]
    plain = advantages_of(halves("grpo")[0], groups)
    found = advantages_of(halves("grpo_invariant", invariance_coef=1.0)[0], groups)
    # returns 0.75 and 0.25, half of the answers each: 1 -+ 8 * 0.25 / 4
    np.testing.assert_allclose(found, plain * np.repeat([0.5, 1.5], 4), rtol=1e-6)


def test_a_weight_never_turns_an_advantage_around():
    groups = [group_of([1, 1, 1, 0]), group_of([1, 0, 0, 0], group=1)]
    found = advantages_of(halves("grpo_invariant", invariance_coef=5.0)[0], groups)
    assert not found[:4].any()
    assert found[4] > 0


@pytest.mark.parametrize("settings", [{"invariance_coef": 0.0}, {}])
def test_without_a_difference_group_invariance_is_grpo_to_the_last_bit(settings):
    groups = (
        random_groups(0, num_groups=3, num_generations=4)
        if settings
        else [group_of([1, 0, None]), group_of([0, 1], group=1), group_of([None, None], group=2)]
    )
    np.testing.assert_array_equal(
        advantages_of(halves("grpo_invariant", **settings)[0], groups),
        advantages_of(halves("grpo")[0], groups),
    )
    assert differing_points(points("grpo_invariant"), points("grpo")) == {"advantage"}


def domain_group(domain, values):
    group = group_of(values)
    return replace(group, prompt=replace(group.prompt, domain=domain))


@pytest.mark.parametrize(
    ("share", "form", "weight"),
    [
        (0.75, "log", 0.847298),
        (0.75, "squared_log", 0.717914),
        (0.75, "inverse", 1.333333),
        (1 / 12, "log", 2.564949),
        (1 / 12, "squared_log", 6.578965),
        (1 / 12, "inverse", 12.0),
    ],
)
def test_rare_domains_weigh_more(share, form, weight):
    found = rewards.scaled_by_domain(
        domain_group("a", [1.0, 1.0]), None, weights=ONE, shares={"a": share}, form=form
    )
    np.testing.assert_allclose(found, weight / 1.00001, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([1, 0, 0, 1], 1 / 12, [2.564898, -2.564898, -2.564898, 2.564898]),
        ([1, 0, 0, 1], 0.75, [0.847281, -0.847281, -0.847281, 0.847281]),
        ([1, 0, 0, 0], 0.75, [2.541792, -0.847264, -0.847264, -0.847264]),
        ([0, 0, 0, 0], 0.75, [0, 0, 0, 0]),
        ([1, 1, 1, 1], 0.75, [0, 0, 0, 0]),
    ],
)
def test_disco_advantages_are_those_worked_by_hand(values, share, expected):
    pipeline, _ = halves("disco_scaling", domain_shares={"a": share})
    found = advantages_of(pipeline, [domain_group("a", values)])
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_domain_without_a_share_counts_as_average_and_missing_rewards_stay_missing():
    def scaled(domain, values, shares):
        return rewards.scaled_by_domain(
            domain_group(domain, values), None, weights=ONE, shares=shares, form="inverse"
        )

    assert scaled("x", [1, 1], {"a": 0.9, "b": 0.1}) == pytest.approx([2, 2], rel=1e-4)
    assert scaled("x", [1, 1], {}) == pytest.approx([1, 1], rel=1e-4)
    np.testing.assert_allclose(scaled("a", [None, 0.5], {}), [np.nan, 1], rtol=1e-4)
    assert scaled("a", [-1, 0.5], {}) == pytest.approx([0, 0])


def test_a_share_outside_zero_and_one_is_refused():
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must lie above 0"):
            halves("disco_scaling", domain_shares={"a": share})


def test_a_prompt_goes_well_or_badly_by_the_mean_of_its_judged_answers():
    groups = [group_of([1, None, None, 0.8]), group_of([0.9, 0.5, 0.7, 0.3], group=1)]
    plain = advantages_of(halves("grpo")[0], groups)
    found = advantages_of(halves("grpo_invariant", invariance_coef=1.0)[0], groups)
    # returns 0.9 and 0.6, 2 and 4 of 6 answers: 1 - 6 * 0.15 / 2 and 1 + 6 * 0.15 / 4
    np.testing.assert_allclose(found, plain * np.repeat([0.55, 1.225], 4), rtol=1e-6)
