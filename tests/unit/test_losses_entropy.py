"""The 80/20 rule: which tokens are kept, and what the two means make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo import token_weights
from grpo.entropy_selection import high_entropy_tokens, high_entropy_weight
from tests.unit.family_cases import halves, loss_and_gradient, points, rows_of
from tests.unit.grpo_groups import flat, loss_inputs, rollout, scored

H = [0.1, 2, 0.3, 0.05, 1.2, 0.6, 0.02, 0.9, 0.4, 0.7]
OWN = (token_weights.policy_tokens_only,)


def with_entropy(*streams, **settings):
    rollouts = [
        replace(rollout(i, len(s), **settings), measured={"entropy": np.array(s, np.float32)})
        for i, s in enumerate(streams)
    ]
    return scored(rollouts, answer=[float(i) for i in range(len(streams))])


def kept(group, rule, share=0.2, among=OWN):
    masks = high_entropy_tokens(group, None, share=share, rule=rule, among=among)
    return [np.flatnonzero(mask).tolist() for mask in masks]


@pytest.mark.parametrize("rule", ["count", "quantile"])
def test_the_fifth_of_highest_entropy_is_kept(rule):
    assert kept(with_entropy(H), rule) == [[1, 4]]
    # over all answers of the group together
    assert kept(with_entropy(H[:3], H[3:6], H[6:]), rule) == [[1], [1], []]
    assert np.quantile(H, 0.8) == pytest.approx(0.96)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (11, 3), (15, 3)])
def test_the_number_of_tokens_is_rounded_up(n, k):
    (places,) = kept(with_entropy(list(range(n))), "count")
    assert places == list(range(n - k, n))


def test_ties_are_cut_by_count_and_kept_by_quantile():
    group = with_entropy([1.0] * 6)
    assert kept(group, "count") == [[0, 1]]
    assert kept(group, "quantile") == [[0, 1, 2, 3, 4, 5]]


def test_only_tokens_that_other_masks_leave_in_are_counted():
    group = with_entropy([9.0, 8.0, 1.0, 2.0, 3.0], guidance=2)
    assert kept(group, "count") == [[4]]
    cut = with_entropy(H, truncated=True)
    assert kept(cut, "count", among=(*OWN, token_weights.not_truncated)) == [[]]


def test_a_group_without_tokens_keeps_none():
    group = with_entropy([], [])
    assert kept(group, "count") == kept(group, "quantile") == [[], []]


# (normaliser, loss of H with token losses 0.1, 0.2, ..., 1.0)
@pytest.mark.parametrize(("normalizer", "expected"), [("kept", 0.35), ("all", 0.07)])
def test_the_loss_is_the_one_worked_by_hand(normalizer, expected):
    pipeline, objective = halves(
        "high_entropy",
        entropy_normalizer=normalizer,
        soft_overlong_cache=0,
        dynamic_sampling=False,
        importance_cap=None,
    )
    (row,) = rows_of(pipeline, [with_entropy(H)])
    # at ratio 1 the loss of a token is minus its advantage
    row = replace(row, advantages=-np.arange(0.1, 1.05, 0.1, dtype=np.float32))
    log_probs = torch.tensor(flat([row.behaviour_log_probs]), requires_grad=True)
    inputs = loss_inputs([row], log_probs=log_probs, proximal=flat([row.behaviour_log_probs]))
    loss, gradient = loss_and_gradient(objective, inputs)
    assert loss == pytest.approx(expected, abs=1e-7)
    assert np.flatnonzero(gradient).tolist() == [1, 4]


def test_the_other_tokens_keep_their_penalties_only_if_they_stay_in_the_mean():
    group = with_entropy(H)
    for normalizer, counted in [("kept", 2), ("all", 10)]:
        pipeline, _ = halves("high_entropy", entropy_normalizer=normalizer, soft_overlong_cache=0)
        pipeline = replace(pipeline, select=())
        (row,) = rows_of(pipeline, [group])
        assert np.count_nonzero(row.weights) == counted
        assert row.weights.sum() == pytest.approx(1.0)


def test_weights_and_masks_select_the_same_tokens():
    group = with_entropy(H, H[::-1])
    settings = {"share": 0.3, "rule": "quantile", "among": OWN}
    masks = high_entropy_tokens(group, None, **settings)
    for mask, weight in zip(masks, high_entropy_weight(group, None, **settings), strict=True):
        np.testing.assert_array_equal(mask, weight)


def test_all_tokens_make_it_dapo():
    assert points("high_entropy", entropy_share=1.0, delta=None) == points("dapo")


def test_the_points_name_the_masks_they_build_on():
    trained = points("high_entropy")["trained"][-1]
    assert "among=(policy_tokens_only, not_truncated)" in trained
