"""Advantages: the numbers worked by hand, what must not change them, and degenerate groups."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from grpo.advantage import centred, centred_values, standardized, standardized_values
from grpo.pipeline import RewardedGroup
from tests.unit.grpo_groups import rollout, scored

NAN = np.nan


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


@pytest.mark.parametrize(
    ("rewards", "ddof", "eps", "expected"),
    [
        # mean 1/2, sum of squares 1: sample deviation 1/sqrt(3) = 0.57735, population 1/2
        ([1, 0, 0, 1], 1, 1e-4, [0.865875, -0.865875, -0.865875, 0.865875]),
        ([1, 0, 0, 1], 1, 1e-6, [0.866024, -0.866024, -0.866024, 0.866024]),
        ([1, 0, 0, 1], 0, 0.0, [1, -1, -1, 1]),
        ([1, 1, 0, 0.5], 1, 1e-4, [0.783186, 0.783186, -1.30531, -0.261062]),
        # two answers: +-1/sqrt(2) whatever their distance
        ([0, 7], 1, 0.0, [-0.707107, 0.707107]),
    ],
)
def test_standardized_advantages_are_those_worked_by_hand(rewards, ddof, eps, expected):
    found = standardized_values(array(*rewards), ddof=ddof, eps=eps)
    np.testing.assert_allclose(found, expected, atol=5e-7)


def test_centred_advantages_are_those_worked_by_hand():
    np.testing.assert_allclose(centred_values(array(1, 0, 0, 1)), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(centred_values(array(1, 1, 0, 0.5)), [0.375, 0.375, -0.625, -0.125])


NORMALISERS = [
    pytest.param(partial(standardized_values, ddof=1, eps=1e-4), id="standardized"),
    pytest.param(centred_values, id="centred"),
]


@pytest.mark.parametrize("values", NORMALISERS)
def test_shifting_all_rewards_changes_nothing(values):
    rewards = np.random.default_rng(0).random(8)
    np.testing.assert_allclose(values(rewards + 3.0), values(rewards), atol=1e-12)


@pytest.mark.parametrize("values", NORMALISERS)
def test_advantages_follow_their_rollouts_when_the_group_is_reordered(values):
    rng = np.random.default_rng(1)
    rewards, order = rng.random(8), rng.permutation(8)
    np.testing.assert_allclose(values(rewards[order]), values(rewards)[order], atol=1e-12)


@pytest.mark.parametrize("values", NORMALISERS)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_the_rewards(values):
    rewards = np.random.default_rng(2).random(8)
    advantages = values(rewards)
    assert abs(advantages.sum()) < 1e-12
    assert (np.argsort(advantages) == np.argsort(rewards)).all()


def test_scaling_rewards_leaves_standardized_advantages_and_scales_centred_ones():
    rewards = np.random.default_rng(3).random(8)
    standard = partial(standardized_values, ddof=1, eps=0.0)
    np.testing.assert_allclose(standard(5 * rewards), standard(rewards), atol=1e-12)
    np.testing.assert_allclose(centred_values(5 * rewards), 5 * centred_values(rewards))


@pytest.mark.parametrize("values", NORMALISERS)
@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param([1.0, 1.0, 1.0, 1.0], id="all right"),
        pytest.param([0.1 + 0.2, 0.3, 0.3], id="equal up to round-off"),
        pytest.param([0.7], id="one rollout"),
        pytest.param([NAN, 0.7, NAN], id="one reward"),
        pytest.param([NAN, NAN], id="no reward"),
    ],
)
def test_a_group_without_a_difference_gets_exactly_zero(values, rewards):
    assert values(array(*rewards)).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("values", NORMALISERS)
def test_an_unscorable_rollout_gets_zero_and_leaves_the_others_as_if_it_were_absent(values):
    found = values(array(1, NAN, 0, 0.5))
    assert found[1] == 0.0
    np.testing.assert_array_equal(found[[0, 2, 3]], values(array(1, 0, 0.5)))


@pytest.mark.parametrize("advantage", [partial(standardized, ddof=0, eps=0.0), centred])
def test_groups_are_compared_within_themselves_and_every_token_gets_its_rollouts_value(advantage):
    low = scored([rollout(0, 3), rollout(1, 1)], answer=[0.0, 1.0])
    high = scored([rollout(0, 2), rollout(1, 4)], group=1, answer=[11.0, 10.0])
    rewarded = [
        RewardedGroup(group=low, components=array(0, 1)[:, None]),
        RewardedGroup(group=high, components=array(11, 10)[:, None]),
    ]
    first, second = advantage(rewarded, None)
    unit = first[1][0]  # the better answer's: 1 standardised, 1/2 centred
    assert unit in (1.0, 0.5)
    assert [tokens.tolist() for tokens in first] == [[-unit] * 3, [unit]]
    assert [tokens.tolist() for tokens in second] == [[unit] * 2, [-unit] * 4]
