"""lambda-GRPO: process sets, theorem 1 and where it ends, the published worked numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from grpo import prefix_sets
from grpo.algorithms import grpo, lambda_grpo_prm
from grpo.batch import build_batch
from tests.unit.grpo_groups import random_groups
from tests.unit.seed_groups import a_rollout, streams, token_group

A, B, C, D, E, F, G, H, I = range(1, 10)  # noqa: E741
S = [[A, B, C], [A, B, D, E], [A, F], [G, H, I]]
S_REWARDS = [1.0, 0.0, 0.0, 1.0]
S_SIZES = [[3, 2, 1], [3, 2, 1, 1], [3, 1], [1, 1, 1]]
S2 = [[1, 2, 3], [1, 2, 3], [1, 2], [4]]


def built(**settings):
    config = lambda_grpo_prm.Config(**settings)
    return lambda_grpo_prm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=96)


def rollouts_of(rows):
    return [a_rollout(i, row) for i, row in enumerate(rows)]


def sizes_of(rows):
    return [sizes.tolist() for sizes in prefix_sets.set_sizes(rollouts_of(rows))]


def random_group(rng, *, alphabet=3, rollouts=6, length=6):
    """Few distinct tokens, so that prefixes and whole answers are shared."""
    rows = [
        rng.integers(1, alphabet + 1, rng.integers(1, length + 1)).tolist() for _ in range(rollouts)
    ]
    return token_group(rows, rng.integers(0, 2, rollouts).astype(float).tolist())


def ratio(prefix):
    """Some function of a prefix, as probabilities are."""
    return 1 + 0.1 * np.sin(sum(q * token for q, token in enumerate(prefix, start=1)))


def penalty(prefix):
    return 0.01 * abs(np.cos(len(prefix) * prefix[-1]))


def objective(pipeline, group, *, ratio=ratio, penalty=penalty):
    """Sum of weight * (ratio * advantage - penalty): what is maximised, without clipping."""
    advantages, weights, _ = streams(pipeline, group)
    total = 0.0
    for place, rollout in enumerate(group.rollouts):
        tokens = rollout.tokens.tolist()
        for t in range(len(tokens)):
            prefix = tokens[: t + 1]
            term = ratio(prefix) * advantages[place][t] - penalty(prefix)
            total += weights[place][t] * term
    return total


def test_sizes_count_the_answers_that_agree_up_to_and_including_the_token():
    assert sizes_of(S) == S_SIZES


def test_duplicates_stay_together_and_a_strict_prefix_counts_up_to_its_last_token():
    assert sizes_of(S2) == [[3, 3, 2], [3, 3, 2], [3, 3], [1]]
    assert sizes_of([[5, 6]] * 3) == [[3, 3]] * 3


def test_sizes_equal_the_definition_on_random_groups():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = [r.tokens.tolist() for r in random_group(rng, rollouts=5).rollouts]
        expected = [
            [sum(other[: t + 1] == row[: t + 1] for other in rows) for t in range(len(row))]
            for row in rows
        ]
        assert sizes_of(rows) == expected


def test_sizes_follow_a_permutation_of_the_answers_and_ignore_what_tokens_are_called():
    for order in itertools.permutations(range(4)):
        assert sizes_of([S[i] for i in order]) == [S_SIZES[i] for i in order]
    assert sizes_of([[100 - t for t in row] for row in S]) == S_SIZES


def test_answers_to_different_contexts_share_nothing():
    first, second = rollouts_of([[1, 2], [1, 2]])
    other = a_rollout(1, [1, 2])
    other = type(other)(
        **{f: getattr(other, f) for f in other.__slots__} | {"context": first.tokens}
    )
    assert [s.tolist() for s in prefix_sets.set_sizes([first, second])] == [[2, 2], [2, 2]]
    assert [s.tolist() for s in prefix_sets.set_sizes([first, other])] == [[1, 1], [1, 1]]


def test_guided_tokens_count_like_the_policys_own():
    group = token_group([[1, 2, 3], [1, 2, 4]], [1.0, 0.0], guidance=[2, 0])
    assert [w.tolist() for w in prefix_sets.inverse_set_size(group, None)] == [[0.5, 0.5, 1]] * 2


def test_worked_example_divides_each_advantage_by_the_size_of_its_set():
    # a = (1 - 0.5) / (0.57735 + 1e-4) = 0.865875
    advantages, weights, terms = streams(built(), token_group(S, S_REWARDS))
    a = [0.865875, -0.865875, -0.865875, 0.865875]
    np.testing.assert_allclose([x[0] for x in advantages], a, atol=1e-6)
    expected = [
        [0.288625, 0.432938, 0.865875],
        [-0.288625, -0.432938, -0.865875, -0.865875],
        [-0.288625, -0.865875],
        [0.865875] * 3,
    ]
    for found, wanted in zip(terms, expected, strict=True):
        np.testing.assert_allclose(12 * found, wanted, atol=1e-6)  # 12 tokens
    # The denominator counts every token once, whatever the sizes.
    assert weights[3][0] == 1 / 12


def test_process_credit_is_the_mean_advantage_of_the_set():
    # Step rewards: A 1/3, AB 1/2; (1/3 - 1/2) / 0.57735 = -0.288675
    advantages, _, _ = streams(built(credit="process", std_eps=0.0), token_group(S, S_REWARDS))
    a, deep = -0.288675, 0.866025
    expected = [[a, 0, deep], [a, 0, -deep, -deep], [a, -deep], [deep] * 3]
    for found, wanted in zip(advantages, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_papers_step_reward_below_the_best_answer_of_its_group_is_reproduced():
    # J K L begins answers with rewards 1, 0, 0; the others got 0.5 each; sample deviation.
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [7], [8], [9]]
    group = token_group(rows, [1, 0, 0, 0.5, 0.5, 0.5])
    advantages, _, _ = streams(built(credit="process", std_eps=0.0), group)
    assert advantages[0][2] == pytest.approx(-0.2214, abs=5e-5)
    assert advantages[0][3] > 0


def test_worked_values_of_the_objectives():
    group = token_group(S, S_REWARDS)

    def value(**settings):
        return objective(built(std_eps=0.0, **settings), group)

    assert value(loss_scale="none") == pytest.approx(-0.000248, abs=1e-6)
    assert value(loss_scale="none", credit="process") == pytest.approx(-0.000248, abs=1e-6)
    assert value() == pytest.approx(0.053358, abs=1e-6)
    assert value(aggregation="sequence_mean") == pytest.approx(0.050522, abs=1e-6)


def test_worked_values_of_the_loss_on_policy_without_a_penalty():
    group = token_group(S, S_REWARDS)

    def loss(**settings):
        return -objective(built(**settings), group, ratio=lambda _: 1.0, penalty=lambda _: 0.0)

    assert loss() == pytest.approx(-0.048104, abs=1e-6)
    assert loss(aggregation="sequence_mean") == pytest.approx(-0.051111, abs=1e-6)
    assert loss(loss_scale="none") == pytest.approx(0, abs=1e-12)
    assert loss(loss_scale="none", aggregation="sequence_mean") == pytest.approx(0, abs=1e-12)


def test_grpo_is_a_process_reward_model_to_1e_12_on_random_groups():
    rng = np.random.default_rng(1)
    outcome = built(loss_scale="none", credit="outcome")
    process = built(loss_scale="none", credit="process")
    differing = 0
    for _ in range(500):
        group = random_group(rng)
        assert abs(objective(outcome, group) - objective(process, group)) < 1e-12
        ours, theirs = streams(outcome, group)[0], streams(process, group)[0]
        differing += any(np.abs(a - b).max() > 0.1 for a, b in zip(ours, theirs, strict=True))
    assert differing > 300  # per token the two are far apart: the identity is no triviality


def test_scaled_outcome_and_scaled_process_credit_are_the_same_update():
    rng = np.random.default_rng(2)
    for _ in range(100):
        group = random_group(rng)
        assert abs(objective(built(), group) - objective(built(credit="process"), group)) < 1e-12


def test_the_identity_fails_where_its_assumptions_are_broken():
    group = token_group(S, S_REWARDS)
    outcome = built(loss_scale="none", std_eps=0.0)
    process = built(loss_scale="none", std_eps=0.0, credit="process")
    # A ratio that depends on what comes after the prefix: here on the answer, through a counter.
    calls = itertools.count()
    answers = [1 + 0.1 * np.sin(i) for i in range(12)]

    def of_the_answer(prefix):
        return answers[next(calls) % 12]

    gap = objective(outcome, group, ratio=of_the_answer) - objective(
        process, group, ratio=of_the_answer
    )
    assert abs(gap) > 1e-3
    # A mean over answers of different lengths weighs the members of a set differently.
    means = {"loss_scale": "none", "aggregation": "sequence_mean"}
    gap = objective(built(**means), group) - objective(built(**means, credit="process"), group)
    assert abs(gap) > 1e-3

    # Clipping bounds the two kinds of advantage differently.
    def clipped(pipeline):
        advantages, weights, _ = streams(pipeline, group)
        total = 0.0
        for place, rollout in enumerate(group.rollouts):
            for t in range(rollout.num_tokens):
                r, a = 1 + 0.5 * np.sin(rollout.tokens[: t + 1].sum()), advantages[place][t]
                total += weights[place][t] * min(r * a, np.clip(r, 0.8, 1.2) * a)
        return total

    assert abs(clipped(outcome) - clipped(process)) > 1e-3


def test_equal_rewards_give_exactly_zero_in_every_form():
    group = token_group(S, [1.0] * 4)
    for settings in ({}, {"credit": "process"}, {"loss_scale": "norm_matched"}):
        _, weights, terms = streams(built(**settings), group)
        assert all((term == 0).all() for term in terms)
        assert all(np.isfinite(weight).all() and (weight > 0).all() for weight in weights)


def test_the_penalty_is_scaled_with_the_policy_term():
    _, weights, _ = streams(built(), token_group(S, [1.0] * 4))
    np.testing.assert_allclose(weights[0], [1 / 36, 1 / 24, 1 / 12])


def test_without_the_scale_it_is_grpo_to_the_last_bit():
    groups = random_groups(3, num_groups=4, num_generations=8)
    settings = {"num_generations": 8, "loss_scale": "none", "aggregation": "sequence_mean"}
    theirs = grpo.pipeline(grpo.Config(), outcomes={"answer": 1.0}, max_completion_length=96)
    updates = [
        build_batch(pipeline, groups, None, step=0, version=0, num_updates=2).batch.updates
        for pipeline in (built(**settings), theirs)
    ]
    for ours, others in zip(*updates, strict=True):
        for row, other in zip(ours, others, strict=True):
            np.testing.assert_array_equal(row.weights, other.weights)
            np.testing.assert_array_equal(row.advantages, other.advantages)


def test_answers_that_share_nothing_are_grpo_to_the_last_bit():
    group = token_group([[1, 2], [3, 4, 5], [6]], [1.0, 0.0, 0.3])
    plain = streams(built(loss_scale="none"), group)[2]
    for scale in ("process_sets", "norm_matched"):
        for a, b in zip(streams(built(loss_scale=scale), group)[2], plain, strict=True):
            np.testing.assert_array_equal(a, b)


def update_norm(rows, terms):
    """Of the gradient, with one orthonormal direction for each distinct prefix."""
    sums = {}
    for row, term in zip(rows, terms, strict=True):
        for t, value in enumerate(term):
            key = tuple(row[: t + 1])
            sums[key] = sums.setdefault(key, 0.0) + value
    return float(np.linalg.norm(list(sums.values())))


@pytest.mark.parametrize("mean", ["token_mean", "sequence_mean"])
def test_the_control_has_grpos_direction_and_the_scaled_updates_norm(mean):
    rng = np.random.default_rng(4)
    for group in [token_group(S, S_REWARDS), *(random_group(rng) for _ in range(20))]:
        rows = [r.tokens.tolist() for r in group.rollouts]
        _, _, scaled = streams(built(aggregation=mean), group)
        _, _, control = streams(built(aggregation=mean, loss_scale="norm_matched"), group)
        _, _, plain = streams(built(aggregation=mean, loss_scale="none"), group)
        if update_norm(rows, plain) == 0:
            continue
        assert update_norm(rows, control) == pytest.approx(update_norm(rows, scaled), rel=1e-12)
        factors = (
            np.concatenate(control)[np.concatenate(plain) != 0]
            / np.concatenate(plain)[np.concatenate(plain) != 0]
        )
        assert np.ptp(factors) < 1e-12 and factors[0] <= 1


def test_the_end_of_sequence_token_can_be_left_out_as_in_the_released_code():
    group = token_group(S, S_REWARDS)
    truncated = a_rollout(3, [G, H, I], truncated=True)
    group = type(group)(
        id=0, prompt=group.prompt, rollouts=(*group.rollouts[:3], truncated), scores=group.scores
    )
    _, weights, _ = streams(built(train_end_of_sequence=False), group)
    assert [(w > 0).tolist() for w in weights] == [
        [True, True, False],
        [True, True, True, False],
        [True, False],
        [True, True, True],
    ]


def test_tree_statistics_of_the_worked_groups():
    depths, shares = prefix_sets.tree_statistics(rollouts_of(S))
    assert depths.tolist() == [2, 2, 1, 0]
    np.testing.assert_allclose(shares, [2 / 3, 1 / 2, 1 / 2, 0])
    depths, shares = prefix_sets.tree_statistics(rollouts_of(S2))
    assert depths.tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(shares, [2 / 3, 2 / 3, 1, 0])


def test_roots_and_leaves_count_only_on_request():
    rows = rollouts_of([[1, 2, 3], [1, 2, 4], [1, 5]])
    depths, shares = prefix_sets.tree_statistics(rows)
    assert depths.tolist() == [1, 1, 0]  # 1 2; the root token 1 is shared by all
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 0])
    depths, shares = prefix_sets.tree_statistics(rows, count_roots=True)
    assert depths.tolist() == [2, 2, 1]
    np.testing.assert_allclose(shares, [2 / 3, 2 / 3, 1 / 2])
    depths, shares = prefix_sets.tree_statistics(rows, count_roots=True, count_leaves=True)
    assert depths.tolist() == [3, 3, 2]
    np.testing.assert_allclose(shares, [1, 1, 1])


def test_metrics_say_how_much_of_a_tree_there_is():
    flat = token_group([[1], [2], [3], [4]], S_REWARDS)
    groups = [token_group(S, S_REWARDS), flat]
    metrics = build_batch(built(), groups, None, step=0, version=0, num_updates=1).metrics
    assert metrics["process_sets/frac_flat"] == 0.5
    assert metrics["process_sets/path_depth"] == 5 / 8
    assert metrics["process_sets/intermediate_share"] == pytest.approx((2 / 3 + 1) / 8)
    assert metrics["process_sets/mean_size"] == pytest.approx((20 + 4) / 16)


def test_a_control_that_means_nothing_is_refused():
    with pytest.raises(ValidationError, match="set credit: outcome"):
        lambda_grpo_prm.Config(loss_scale="norm_matched", credit="process")


def test_an_empty_completion_is_in_no_set_and_harms_nothing():
    for settings in ({}, {"credit": "process"}, {"loss_scale": "norm_matched"}):
        for rows in ([[], [1, 2]], [[], []]):
            group = token_group(rows, [0.0, 1.0])
            built_batch = build_batch(
                built(**settings), [group], None, step=0, version=0, num_updates=1
            )
            (update,) = built_batch.batch.updates
            trained = [len(row) for row in rows if row] or [0]
            assert [len(row.tokens) for row in update] == trained
            assert all(np.isfinite(row.weights).all() for row in update)
            assert all(np.isfinite(value) for value in built_batch.metrics.values())
            assert built_batch.metrics["process_sets/mean_size"] == float(any(rows))
