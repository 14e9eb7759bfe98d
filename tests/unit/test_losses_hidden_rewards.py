"""Token hidden rewards: scores worked by hand and by brute force, and what NTHR and THR make of
them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo import hidden_rewards
from grpo.hidden_rewards import MEASURE, steered, weakened_negatives
from grpo.objective import Signal
from grpo.pipeline import RewardedGroup
from tests.unit.family_cases import advantages_of, differing_points, halves, points, rows_of
from tests.unit.grpo_groups import rollout, scored
from tests.unit.output_layers import LinearLayer, TabledLayer, random_rows

P0 = [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]]
P2 = [[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]
JUDGES = {"weights": {"answer": 1.0}, "right_above": 0.0}


def scores(layer, rows):
    return [stream.tolist() for stream in hidden_rewards.hidden_rewards(rows, layer)]


def measured(streams, outcomes, *, guidance=()):
    """A group whose rollouts carry these scores."""
    given = guidance or [0] * len(streams)
    rollouts = [
        replace(
            rollout(i, len(stream), guidance=given[i]),
            measured={"hidden_reward": np.array(stream, np.float32)},
        )
        for i, stream in enumerate(streams)
    ]
    return scored(rollouts, answer=list(outcomes))


def three_rows(layer):
    return [
        layer.row([0, 1], P0, [[1, 0], [0, 1]], label=1),
        layer.row([0, 2], P0, [[1, 0], [0.6, 0.8]], label=0),
        layer.row([1, 0], P2, [[1, 0], [0.8, 0.6]], label=1),
    ]


def four_rows(layer):
    first, _, third = three_rows(layer)
    return [
        first,
        layer.row([0, 1], P0, [[0, 1], [0.6, 0.8]], label=0),
        third,
        layer.row([2, 2], P2, [[1, 0], [0.8, 0.6]], label=0),
    ]


# M+ = [[.4, -.1], [-.1, .2], [-.3, -.1]] from the two tokens of the right answer
TOY = ([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2]], [[0.4, 0.4, 0.2], [0.2, 0.7, 0.1]])


def toy_rows(layer):
    return [
        layer.row([0, 1], TOY[0], [[1, 0], [0.5, 0.5]], label=1),
        layer.row([0, 1], TOY[1], [[0.8, 0.2], [0.5, 1.0]], label=0),
        layer.row([2], [[0.1, 0.1, 0.8]], [[9, 9]]),  # unjudged: all three ids occur
    ]


@pytest.mark.parametrize("chunk_tokens", [1, 100])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (toy_rows, [[0.29, 0.03], [0.248, 0.05]]),
        (three_rows, [[0.052, 0.432], [0.052, -1.0008], [0.252, 0.676]]),
        (four_rows, [[0.052, 0.432], [0.024, 0.5832], [0.252, 0.676], [-0.868, -0.564]]),
    ],
)
def test_scores_are_those_worked_by_hand(make, expected, chunk_tokens):
    layer = TabledLayer(chunk_tokens=chunk_tokens)
    found = scores(layer, make(layer))[: len(expected)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_scores_are_the_sum_over_all_pairs_of_tokens():
    rows = random_rows(0, lengths=[5, 7, 3, 4], labels=[1, 0, 1, 0], vocabulary=6, size=4)
    layer = LinearLayer(weight=torch.randn(4, 6, dtype=torch.float64), chunk_tokens=3)
    ids = torch.cat([row.tokens for row in rows]).unique()
    whole = LinearLayer(weight=layer.weight)

    def errors(row):
        onehot = torch.nn.functional.one_hot(row.tokens, 6).double()
        return (onehot - whole.log_probs(row.hidden).exp())[:, ids]

    right = [row for row in rows if row.label == 1]
    for row, found in zip(rows, hidden_rewards.hidden_rewards(rows, layer), strict=True):
        brute = sum(
            ((errors(row) @ errors(other).T) * (row.hidden @ other.hidden.T)).sum(1)
            for other in right
        )
        torch.testing.assert_close(found, brute, atol=1e-10, rtol=0)


def test_given_tokens_take_no_part():
    layer = TabledLayer()
    hidden = [[3, 1], [1, 0], [0.5, 0.5]]
    p = [[0.1, 0.1, 0.8], *TOY[0]]
    guided = layer.row([2, 0, 1], p, hidden, label=1, guidance=1)
    found = scores(layer, [guided, toy_rows(layer)[1]])
    np.testing.assert_allclose(found[0], [0.0, 0.29, 0.03], atol=1e-9)
    np.testing.assert_allclose(found[1], [0.248, 0.05], atol=1e-9)


@pytest.mark.parametrize("labels", [[0, 0], [float("nan"), 0]])
def test_without_a_right_answer_there_are_no_scores(labels):
    rows = random_rows(1, lengths=[3, 2], labels=labels, vocabulary=4, size=2)
    rows = [replace(row, log_probs=row.log_probs - 0.5) for row in rows]
    layer = LinearLayer(weight=torch.randn(2, 4, dtype=torch.float64))
    assert scores(layer, rows) == [[0.0] * 3, [0.0] * 2]


def test_the_measure_asks_for_hidden_states_and_scores_carry_no_gradient():
    assert MEASURE.needs == {Signal.HIDDEN}
    layer = LinearLayer(weight=torch.randn(2, 4, dtype=torch.float64))
    rows = random_rows(2, lengths=[3, 2], labels=[1, 0], vocabulary=4, size=2)
    assert not any(stream.requires_grad for stream in MEASURE.fn(rows, layer))


THREE = [[0.052, 0.432], [0.052, -1.0008], [0.252, 0.676]]
FOUR = [[0.052, 0.432], [0.024, 0.5832], [0.252, 0.676], [-0.868, -0.564]]


@pytest.mark.parametrize(
    ("streams", "outcomes", "threshold", "eta", "expected"),
    [
        # tau = 0.242: nothing above it
        (THREE, [1, 0, 1], 1.0, "imbalance", {1: [1, 1]}),
        (THREE, [1, 0, 1], 0.0, "imbalance", {1: [1 / 3, 1]}),
        (FOUR, [1, 0, 1, 0], 1.0, "imbalance", {1: [1, 0], 3: [1, 1]}),
        (FOUR, [1, 0, 1, 0], 0.5, "imbalance", {1: [1, 0], 3: [1, 1]}),
        (FOUR, [1, 0, 1, 0], 0.0, "imbalance", {1: [0, 0], 3: [1, 1]}),
        (FOUR, [1, 0, 1, 0], 1.0, "right_share", {1: [1, 0.5], 3: [1, 1]}),
        (THREE, [1, 0, 1], 0.0, "wrong_share", {1: [1 / 3, 1]}),
        (THREE, [1, 0, 1], 0.0, "zero", {1: [0, 1]}),
        # tau = 0.16, p = 1/2
        ([[0.29, 0.03], [0.248, 0.05]], [1, 0], 1.0, "imbalance", {1: [0, 1]}),
    ],
)
def test_wrong_answers_are_spared_where_they_resemble_right_ones(
    streams, outcomes, threshold, eta, expected
):
    group = measured(streams, outcomes)
    found = weakened_negatives(group, None, **JUDGES, threshold=threshold, eta=eta)
    for place, factors in enumerate(found):
        np.testing.assert_allclose(factors, expected.get(place, [1, 1]), atol=1e-7)


@pytest.mark.parametrize(("num_right", "eta"), [(1, 0.75), (2, 0.5), (4, 0.0), (7, 0.75)])
def test_eta_is_how_far_the_group_is_from_half_right(num_right, eta):
    outcomes = [1.0] * num_right + [0.0] * (8 - num_right)
    group = measured([[1.0]] * 8, outcomes)
    found = weakened_negatives(group, None, **JUDGES, threshold=0.5, eta="imbalance")
    assert found[-1].tolist() == [pytest.approx(eta)]


def test_one_right_answer_gives_the_threshold_and_guidance_does_not():
    streams = [[9.0, 0.2, 0.4], [0.29, 0.31]]
    group = measured(streams, [1, 0], guidance=[1, 0])
    assert hidden_rewards.smallest_mean(group, np.array([1.0, 0.0])) == pytest.approx(0.3)
    found = weakened_negatives(group, None, **JUDGES, threshold=1.0, eta="zero")
    assert found[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("outcomes", [[1, 1], [0, 0], [None, None], [1, None]])
def test_a_group_without_both_kinds_is_left_alone(outcomes):
    group = measured([[0.3, -0.2], [0.1, 0.5]], outcomes)
    weak = weakened_negatives(group, None, **JUDGES, threshold=0.0, eta="zero")
    steer = steered(group, None, **JUDGES, threshold=0.0, steer=0.5, mask=True)
    assert [f.tolist() for f in (*weak, *steer)] == [[1, 1]] * 4


TOY_SCORES = [[0.29, 0.03], [0.248, 0.05]]


@pytest.mark.parametrize(
    ("steer", "threshold", "mask", "expected"),
    [
        (0.2, 0.0, True, [[1.2, 1.2], [0.8, 0.8]]),
        (-0.2, 0.0, True, [[0.8, 0.8], [1.2, 1.2]]),
        # 0.3 / 0.16: an absolute threshold of 0.3
        (0.2, 0.3 / 0.16, True, [[0, 0], [0, 0]]),
        (0.2, 1.0, True, [[1.2, 0], [0.8, 0]]),
        (0.2, 1.0, False, [[1.2, 1.2], [0.8, 0.8]]),
        (0.0, 1.0, True, [[1, 0], [1, 0]]),
        (0.0, 1.0, False, [[1, 1], [1, 1]]),
    ],
)
def test_steering_weighs_tokens_by_the_sign_of_their_hidden_reward(
    steer, threshold, mask, expected
):
    group = measured(TOY_SCORES, [1, 0])
    found = steered(group, None, **JUDGES, threshold=threshold, steer=steer, mask=mask)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_an_answer_that_nobody_judged_is_neither_right_nor_wrong():
    group = measured([[0.3], [0.1], [5.0]], [1, 0, None])
    found = steered(group, None, **JUDGES, threshold=0.0, steer=0.5, mask=True)
    assert [f.tolist() for f in found] == [[1.5], [0.5], [1.0]]
    labels = hidden_rewards.right_labels(group, None, **JUDGES)
    np.testing.assert_array_equal(labels, [1, 0, np.nan])


def test_the_multiplied_advantages_are_those_worked_by_hand():
    group = measured(THREE, [1, 0, 1])
    pipeline, _ = halves("nthr", threshold=0.0, std_eps=0.0, num_generations=3)
    np.testing.assert_allclose(
        advantages_of(pipeline, [group]), [0.707107, -1.414214, 0.707107], atol=1e-6
    )
    rows = rows_of(pipeline, [group])
    np.testing.assert_allclose(rows[1].policy_weights, [1 / 3, 1], atol=1e-6)
    assert [row.policy_weights.tolist() for row in (rows[0], rows[2])] == [[1, 1]] * 2


@pytest.mark.parametrize(
    ("name", "settings"), [("nthr", {"eta": "one"}), ("thr", {"steer": 0.0, "mask": False})]
)
def test_neutral_settings_leave_grpo(name, settings):
    plain = {"std_ddof": 1, "beta": 0.0}
    assert points(name, **settings, **plain) == points("grpo", **plain)


def test_thr_and_nthr_differ_from_grpo_in_weights_alone():
    extra = {"token_weight", "measures", "metrics"}
    for name in ("nthr", "thr"):
        assert differing_points(points(name, std_ddof=1, beta=0.0), points("grpo")) <= extra


def test_scores_of_right_and_wrong_answers_are_plotted_apart():
    groups = [
        RewardedGroup(group=measured(s, o), components=np.zeros((len(o), 1)))
        for s, o in [(TOY_SCORES, [1, 0]), ([[1.0]], [None])]
    ]
    found = hidden_rewards.hidden_reward_metrics(groups, None, **JUDGES)
    assert found == {
        "hidden_reward/right": pytest.approx(0.16),
        "hidden_reward/wrong": pytest.approx(0.149),
    }


def test_the_threshold_is_that_of_the_least_supported_right_answer():
    labels = np.array([1.0, 0.0, 1.0, 0.0])
    assert hidden_rewards.smallest_mean(measured(FOUR, labels), labels) == pytest.approx(0.242)
    group = measured([[0.052, 0.432], [0.3, 0.2], [0.252, 0.676]], [1, 0, 1])
    found = weakened_negatives(group, None, **JUDGES, threshold=1.0, eta="zero")
    assert found[1].tolist() == [0.0, 1.0]  # 0.3 is above 0.242, not above 0.464


def test_a_score_at_the_threshold_is_not_above_it():
    group = measured([[0.25], [0.25, 0.5]], [1, 0])
    weak = weakened_negatives(group, None, **JUDGES, threshold=1.0, eta="zero")
    assert [f.tolist() for f in weak] == [[1.0], [1.0, 0.0]]
    steer = steered(group, None, **JUDGES, threshold=1.0, steer=0.5, mask=True)
    assert [f.tolist() for f in steer] == [[0.0], [0.0, 0.5]]


def test_a_token_without_hidden_reward_is_not_steered():
    group = measured([[0.5], [0.0, 1.0]], [1, 0])
    found = steered(group, None, **JUDGES, threshold=0.0, steer=0.5, mask=False)
    assert [f.tolist() for f in found] == [[1.5], [1.0, 0.5]]


def test_an_outcome_at_the_bound_is_wrong():
    group = measured([[1.0]] * 3, [0.5, 0.6, 0.4])
    found = hidden_rewards.right_labels(group, None, weights={"answer": 1.0}, right_above=0.5)
    assert found.tolist() == [0.0, 1.0, 0.0]
