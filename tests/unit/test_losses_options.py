"""Knobs of every member, KL in the reward, BNPO's means and multi-label rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from grpo import aggregation, rewards, selection, step_advantage
from grpo.algorithms import ALGORITHMS
from grpo.algorithms.options import with_knobs
from grpo.describe import described
from grpo.pipeline import RewardedGroup
from grpo.types import Dropped
from tests.unit.family_cases import (
    advantages_of,
    differing_points,
    halves,
    points,
    rows_of,
)
from tests.unit.grpo_groups import random_groups, rollout, scored

DECOUPLED = {"combine": "decoupled"}
TAKES_LABELS = {"disco", "rebel"}  # the learner turns what they send into advantages
STANDARDISED_ONE_BY_ONE = {"gdpo"}  # where a KL term's coefficient would mean nothing
KL_IN_REWARD = sorted(ALGORITHMS.keys() - STANDARDISED_ONE_BY_ONE)


def with_reference(group, gaps):
    """log policy - log reference of every token of each rollout."""
    rollouts = [
        replace(r, measured={"reference": r.log_probs - np.float32(gap)})
        for r, gap in zip(group.rollouts, gaps, strict=True)
    ]
    return replace(group, rollouts=tuple(rollouts))


def test_knobs_act_once_in_a_pipeline_that_is_made_from_a_members():
    member = ALGORITHMS["grpo"]
    config = member.config(negative_scale=0.5, reward_margin=0.5)
    settings = {"outcomes": {"answer": 1.0}, "max_completion_length": 96}
    once = member.pipeline(config, **settings)
    twice = with_knobs(member.pipeline, config, **settings)
    objective = member.objective(config)
    assert described(twice, objective) == described(once, objective)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in TAKES_LABELS])
def test_every_member_can_scale_what_it_pushes_down(name):
    text = points(name, negative_scale=0.5)["advantage"]
    assert text[0].startswith("negative_scaled(advantage=") and "scale=0.5)" in text[0]
    assert differing_points(points(name, negative_scale=0.5), points(name)) == {"advantage"}


@pytest.mark.parametrize("name", TAKES_LABELS)
def test_members_that_send_labels_or_rewards_cannot_scale_them(name):
    with pytest.raises(ValidationError, match="negative_scale"):
        ALGORITHMS[name].config(negative_scale=0.0)


def test_negative_advantages_alone_are_scaled():
    groups = random_groups(0, num_groups=2, num_generations=4)
    plain = advantages_of(halves("grpo")[0], groups)
    halved = advantages_of(halves("grpo", negative_scale=0.5)[0], groups)
    np.testing.assert_allclose(halved, np.where(plain < 0, plain / 2, plain), rtol=1e-6)
    assert (advantages_of(halves("grpo", negative_scale=0)[0], groups) >= 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_member_can_ask_for_a_margin(name):
    found = points(name, reward_margin=0.5)["select"]
    assert found[0].startswith("drop_if_small_margin(weights=")
    assert found[1:] == points(name)["select"]


@pytest.mark.parametrize(
    ("outcomes", "margin", "is_kept"),
    [
        ([1, 0.8], 0.5, False),
        ([1, 0.2], 0.5, True),
        ([0.5, 0.5], 0.5, False),
        ([1, 0.8], 0.0, True),
        ([1, 0.2], 0.0, True),
        ([0.5, 0.5], 0.0, False),
        ([1, None], 0.0, False),
        ([None, None], 0.0, False),
        ([0.9, 0.1, None, 0.5], 0.7, True),
    ],
)
def test_a_group_is_kept_for_the_margin_between_its_best_and_worst(outcomes, margin, is_kept):
    group = scored([rollout(i, 2) for i in range(len(outcomes))], answer=outcomes)
    found = selection.drop_if_small_margin(group, None, weights={"answer": 1.0}, margin=margin)
    assert (found is group) == is_kept
    if isinstance(found, Dropped):
        assert found.reason == "small_margin"


@pytest.mark.parametrize(("name", "settings"), [("gdpo", {}), ("multi_label", DECOUPLED)])
def test_the_kl_is_no_reward_to_be_standardised(name, settings):
    with pytest.raises(ValueError, match="each reward is standardised by itself"):
        halves(name, kl_in_reward=0.1, **settings)


@pytest.mark.parametrize("name", KL_IN_REWARD)
def test_kl_in_the_reward_asks_for_the_reference_only_where_it_is_on(name):
    plain, of_plain = halves(name, kl_in_reward=0.0)
    pipeline, objective = halves(name, kl_in_reward=0.1)
    assert [m.name for m in plain.measures] == [m.name for m in of_plain.measures]
    for with_kl, without in ((pipeline, plain), (objective, of_plain)):
        names = [m.name for m in with_kl.measures]
        assert names == list(dict.fromkeys([*[m.name for m in without.measures], "reference"]))
    assert len(pipeline.rewards) > len(plain.rewards) or name.startswith("reinforce_pp")


@pytest.mark.parametrize("name", ["grpo", "gspo", "pods", "cispo", "thr"])
def test_any_member_takes_the_kl_off_its_rewards(name):
    group = with_reference(scored([rollout(0, 2), rollout(1, 4)], answer=[1, 0]), [0.5, -0.25])
    pipeline, _ = halves(name, kl_in_reward=0.1)
    columns = [reward(group, pipeline.initial_state) for reward in pipeline.rewards]
    np.testing.assert_allclose(np.sum(columns, axis=0), [1 - 0.1 * 1.0, 0.1 * 1.0], atol=1e-6)


def test_k1_as_a_loss_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"gradient as a loss has mean zero.*kl_in_reward"):
        halves("grpo", kl_estimator="k1")


def test_the_kl_term_of_an_answer_is_a_sum_over_its_own_tokens():
    group = scored([rollout(0, 3, guidance=1), rollout(1, 2), rollout(2, 2)], answer=[1, 0, None])
    found = rewards.kl_to_reference(with_reference(group, [0.5, -0.25, 1.0]), None, coefficient=0.1)
    np.testing.assert_allclose(found, [-0.1, 0.05, np.nan], atol=1e-7)


def test_rloo_with_the_kl_in_its_reward_is_trls():
    group = with_reference(scored([rollout(0, 2), rollout(1, 4)], answer=[1, 0]), [0.5, 0.0])
    pipeline, _ = halves("rloo", kl_in_reward=0.05, beta=0)
    # rewards 1 - 0.05 * 1 and 0
    np.testing.assert_allclose(advantages_of(pipeline, [group]), [0.95, -0.95], atol=1e-6)


def test_the_kl_of_a_token_is_taken_off_its_return_and_those_before_it():
    gaps = [np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5])]
    group = with_reference(scored([rollout(0, 3), rollout(1, 2)], answer=[1, 0]), gaps)
    settings = {"baseline": "none", "gamma": 0.5, "kl_coef": 0.1}
    rewarded = RewardedGroup(group=group, components=np.array([[1.0], [0.0]]))
    (found,) = step_advantage.whitened([rewarded], None, **settings)
    # returns 0.25, 0.5, 1 less 0.1 * (3, 4, 4), and 0 less 0.1 * (0.25, 0.5)
    returns = np.array([-0.05, 0.1, 0.6, -0.025, -0.05])
    expected = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_policy_that_is_its_reference_pays_nothing(name):
    group = scored([rollout(i, i + 1) for i in range(4)], answer=[1, 0, 0, 1])
    same = with_reference(group, [0.0] * 4)
    paid = advantages_of(halves(name, kl_in_reward=0.5)[0], [same])
    np.testing.assert_array_equal(paid, advantages_of(halves(name)[0], [group]))


def masks(*lengths):
    return [[np.ones(n, bool) for n in group] for group in lengths]


def test_a_mean_over_each_groups_tokens_is_one_between_answers_and_update():
    found = aggregation.group_token_mean(masks([1, 3], [2, 2]))
    assert [m.tolist() for g in found for m in g] == [[1 / 8], [1 / 8] * 3, *[[1 / 8] * 2] * 2]
    found = aggregation.group_token_mean(masks([1, 1], [2, 2]))
    assert [m.tolist() for g in found for m in g] == [[1 / 4]] * 2 + [[1 / 8] * 2] * 2
    empty = aggregation.group_token_mean([[np.zeros(2, bool)], [np.ones(2, bool)]])
    assert [m.tolist() for g in empty for m in g] == [[0, 0], [1 / 4, 1 / 4]]


def test_bnpo_is_dapos_mean_or_grpo():
    assert differing_points(points("bnpo"), points("grpo")) == {"aggregation"}
    assert points("bnpo", local_batch="answer") == points("grpo")
    neutral = {
        "num_generations": 8,
        "epsilon_high": None,
        "dynamic_sampling": False,
        "mask_truncated_completions": False,
        "soft_overlong_cache": 0,
    }
    assert points("bnpo") == points("dapo", **neutral)
    one = random_groups(0, num_groups=1, num_generations=4)
    update, group = (rows_of(halves("bnpo", local_batch=b)[0], one) for b in ("update", "group"))
    for left, right in zip(update, group, strict=True):
        np.testing.assert_array_equal(left.weights, right.weights)


PREDICTED = [[0.9, 0.8, 0.2, 1], [0.5, 0.9, 0.6, 0.9], [0.7, 0.1, 0.9, 0], [0.9] * 4]
LABELS = ("polite", "meaningful", "actionable", "safe")


def labelled():
    columns = dict(zip(LABELS, map(list, zip(*PREDICTED, strict=True)), strict=True))
    return scored([rollout(i, i + 1) for i in range(4)], **columns)


@pytest.mark.parametrize(
    ("weights", "rewarded", "expected"),
    [
        ({}, [0.725, 0.725, 0.425, 0.9], [0.158351, 0.158351, -1.361817, 1.045115]),
        (
            dict(zip(LABELS, [0.1, 0.2, 0.2, 0.5], strict=True)),
            [0.79, 0.8, 0.27, 0.9],
            [0.351530, 0.386683, -1.476426, 0.738213],
        ),
    ],
)
def test_labels_make_one_reward_as_worked_by_hand(weights, rewarded, expected):
    pipeline, _ = halves("multi_label", outcomes=dict.fromkeys(LABELS, 1.0), label_weights=weights)
    group = labelled()
    total = np.sum([term(group, None) for term in pipeline.rewards], axis=0)
    np.testing.assert_allclose(total, rewarded, atol=1e-12)
    np.testing.assert_allclose(advantages_of(pipeline, [group]), expected, atol=1e-6)


def test_one_label_is_grpo_and_labels_kept_apart_are_gdpo():
    assert points("multi_label") == points("grpo")
    outcomes = {"answer": 2.0, "form": 1.0}
    apart = points("multi_label", outcomes=outcomes, label_weights=outcomes, combine="decoupled")
    assert apart == points("gdpo", outcomes=outcomes)


def test_a_label_without_a_scorer_is_refused_and_one_without_weight_is_left_out():
    with pytest.raises(ValueError, match=r"label_weights names safety, but .* are answer"):
        halves("multi_label", label_weights={"safety": 1.0})
    found = points(
        "multi_label", outcomes={"a": 1.0, "b": 1.0}, label_weights={"a": 1.0, "b": 0.0}
    )["rewards"]
    assert len(found) == 1
