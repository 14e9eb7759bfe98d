"""Members that change the ratio or its clip: values and gradients worked by hand, reductions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo import ratios
from grpo.aggregation import sequence_mean, token_mean
from grpo.algorithms import ALGORITHMS
from grpo.surrogates import clipped, clipped_weight, soft_gated
from tests.unit.family_cases import (
    advantages_of,
    differing_points,
    halves,
    loss_and_gradient,
    points,
    row_inputs,
    rows_of,
    toy_inputs,
)
from tests.unit.grpo_groups import LENGTHS, flat, random_groups, rollout, scored, token_inputs

A = [1.0, -1.0, -1.0, 1.0]
# products of the toy batch: exp of the mean log-ratio of each answer
SEQUENCE = [0.935507, 1.105171, 0.975310, 1.0]
TOY_MASKS = [[np.ones(n, bool) for n in LENGTHS]]
CLIP_RANGE = ("sapo", "cispo", "gspo", "gspo_token", "rloo", "grpo")


def toy_loss(objective, advantages, aggregation):
    """Loss of the toy batch and the gradient on its log-probabilities."""
    weights = torch.tensor(flat(aggregation(TOY_MASKS)[0]))
    return loss_and_gradient(objective, replace(toy_inputs(advantages), weights=weights))


def gradient_of(surrogate, log_ratio, advantage):
    log_probs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=log_probs, proximal=[0.0], advantages=[advantage])
    term = surrogate(ratios.token_log_ratio(inputs), inputs)
    (gradient,) = torch.autograd.grad(term.loss.sum(), log_probs)
    return term, gradient.item()


def test_sequence_ratios_of_the_toy_batch_are_those_worked_by_hand():
    inputs = toy_inputs(A)
    for ratio in (ratios.sequence_mean_log_ratio, ratios.sequence_token_log_ratio):
        np.testing.assert_allclose(
            ratio(inputs).detach().exp(), np.repeat(SEQUENCE, LENGTHS), atol=1e-6
        )
    # sums of the log-ratios: 0.1 - 0.3, 0.2, 0.4 - 0.5, 0
    np.testing.assert_allclose(
        ratios.sequence_sum_log_ratio(inputs).detach(), np.repeat([-0.2, 0.2, -0.1, 0], LENGTHS)
    )


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_the_gspo_loss_of_the_toy_batch_is_the_one_worked_by_hand(name):
    _, objective = halves(name)
    loss, _ = toy_loss(objective, A, sequence_mean)
    # (-0.935507 + 1.105171 + 0.9997 - 1) / 4
    assert loss == pytest.approx(0.042341, abs=1e-6)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_the_gspo_gradient_without_clipping_is_the_one_worked_by_hand(name):
    _, objective = halves(name, epsilon=0.9, epsilon_high=9.0)
    _, gradient = toy_loss(objective, A, sequence_mean)
    # of -loss, times B: A * s / T on each token
    expected = np.repeat([0.311836, -0.552585, -0.243827, 1.0], LENGTHS)
    np.testing.assert_allclose(-4 * gradient, expected, atol=1e-6)


def test_gspo_and_gspo_token_part_where_advantages_differ_within_an_answer():
    inputs = replace(toy_inputs(A), advantages=torch.linspace(-1, 1, 10, dtype=torch.float64))
    gradients = [
        loss_and_gradient(halves(name, epsilon=0.9, epsilon_high=9.0)[1], inputs)[1]
        for name in ("gspo", "gspo_token")
    ]
    assert not np.allclose(*gradients)
    # each token of GSPO-token follows its own advantage
    assert (np.sign(-gradients[1]) == np.sign(inputs.advantages.numpy())).all()


def test_a_token_that_is_not_trained_is_in_no_sequence_ratio():
    inputs = toy_inputs(A)
    weights = inputs.weights.clone()
    weights[1] = 0.0
    masked = replace(inputs, weights=weights)
    # without -0.3: mean of 0.1 and 0, sum 0.1
    assert ratios.sequence_mean_log_ratio(masked)[0].item() == pytest.approx(0.05)
    assert ratios.sequence_sum_log_ratio(masked)[0].item() == pytest.approx(0.1)
    none = replace(inputs, weights=torch.zeros(10, dtype=torch.float64))
    assert not ratios.sequence_mean_log_ratio(none).any()


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "rloo"])
def test_on_answers_of_one_token_a_sequence_ratio_is_the_token_ratio_to_the_last_bit(name):
    groups = [scored([rollout(i, 1, log_probs=[-0.5]) for i in range(4)], answer=[1, 0, 0, 1])]
    pipeline, objective = halves(name, num_generations=4, epsilon=0.2, epsilon_high=0.3, beta=0)
    inputs = row_inputs(objective, rows_of(pipeline, groups))
    token = replace(objective, log_ratio=ratios.token_log_ratio)
    for ours, theirs in zip(
        loss_and_gradient(objective, inputs), loss_and_gradient(token, inputs), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("low", "high", "losses", "slopes"),
    [
        # third answer: ratios e^0.4, 1, e^-0.5, 1; log-probabilities -0.8, -0.4, -1.4, -0.1
        (None, 5.0, [-1.193460, -0.4, -0.849143, -0.1], [-1.491825, -1.0, -0.606531, -1.0]),
        (None, 1.28, [-1.024, -0.4, -0.849143, -0.1], [-1.28, -1.0, -0.606531, -1.0]),
        (0.8, 1.28, [-1.024, -0.4, -1.12, -0.1], [-1.28, -1.0, -0.8, -1.0]),
    ],
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(low, high, losses, slopes):
    inputs = toy_inputs(A)
    term = clipped_weight(ratios.token_log_ratio(inputs), inputs, low=low, high=high)
    (gradient,) = torch.autograd.grad(term.loss.sum(), inputs.log_probs)
    np.testing.assert_allclose(term.loss.detach()[5:9], losses, atol=1e-6)
    np.testing.assert_allclose(-gradient[5:9], slopes, atol=1e-6)
    assert term.clipped_high[5:9].tolist() == [high < 1.4, False, False, False]
    assert term.clipped_low[5:9].tolist() == [False, False, low is not None, False]


@pytest.mark.parametrize(
    ("ratio", "positive", "negative", "slope_positive", "slope_negative"),
    [
        (0.5, 1.510163, 1.415938, 0.470007, 0.467070),
        (1.0, 2.0, 1.904762, 1.0, 1.0),
        (1.5, 2.489837, 2.393585, 1.410022, 1.401210),
        (3.0, 3.523188, 3.393917, 1.259923, 1.166336),
    ],
)
def test_the_soft_gate_and_its_slope_are_those_worked_by_hand(
    ratio, positive, negative, slope_positive, slope_negative
):
    surrogate = partial(soft_gated, tau_positive=1.0, tau_negative=1.05)
    term, slope = gradient_of(surrogate, np.log(ratio), 1.0)
    assert (-term.loss.item(), -slope) == pytest.approx((positive, slope_positive), abs=1e-6)
    term, slope = gradient_of(surrogate, np.log(ratio), -1.0)
    assert (term.loss.item(), slope) == pytest.approx((negative, slope_negative), abs=1e-6)
    assert not (term.clipped_low | term.clipped_high).any()


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", ["cispo", "sapo", "gspo", "rloo"])
def test_an_extreme_ratio_gives_finite_loss_and_gradient_in_single_precision(
    name, log_ratio, advantage
):
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    inputs = replace(
        token_inputs(log_probs=log_probs, proximal=[0.0]),
        advantages=torch.tensor([advantage]),
        weights=torch.ones(1),
    )
    _, objective = halves(name, beta=0.0)
    loss, gradient = loss_and_gradient(objective, inputs)
    assert np.isfinite([loss, *gradient]).all()


@pytest.mark.parametrize("name", ["cispo", "sapo", "gspo", "gspo_token", "rloo"])
def test_on_policy_every_ratio_gives_the_gradient_of_ppo_clip(name):
    groups = random_groups(3, num_groups=2, num_generations=4)
    pipeline, objective = halves(name, num_generations=4, beta=0, importance_cap=None)
    rows = rows_of(pipeline, groups)
    inputs = row_inputs(objective, rows)
    on_policy = replace(inputs, proximal_log_probs=inputs.log_probs.detach())
    _, ours = loss_and_gradient(objective, on_policy)
    _, theirs = loss_and_gradient(halves("grpo", importance_cap=None)[1], on_policy)
    if name == "rloo":  # the gradient of the sum, not of the mean
        theirs = theirs * np.repeat(
            [len(row.tokens) for row in rows], [len(r.tokens) for r in rows]
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "sapo"])
def test_these_differ_from_grpo_in_the_learner_alone(name):
    changed = {"sapo": {"surrogate"}}.get(name, {"log_ratio", "surrogate"})
    assert differing_points(points(name), points("grpo")) == changed


def test_gspo_token_is_gspo_with_another_ratio_and_cispo_is_a_token_mean():
    assert differing_points(points("gspo"), points("gspo_token")) == {"log_ratio"}
    assert differing_points(points("cispo"), points("grpo")) == {"surrogate", "aggregation"}


def test_rloo_with_token_ratios_is_dr_grpo_with_another_scale_and_mean():
    found = differing_points(
        points("rloo", ratio="token", num_generations=8, beta=0), points("dr_grpo")
    )
    assert found == {"advantage", "aggregation"}
    assert differing_points(points("rloo", ratio="token"), points("rloo")) == {
        "aggregation",
        "log_ratio",
    }


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([1, 1, 0, 0.5], [0.5, 0.5, -0.833333, -0.166667]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([1, None, 0, None], [1, 0, -1, 0]),  # of two answers each is the other's baseline
        ([1, None, None, None], [0, 0, 0, 0]),
    ],
)
def test_leaving_one_out_gives_the_advantages_worked_by_hand(rewards, expected):
    group = scored([rollout(i, 2) for i in range(4)], answer=rewards)
    pipeline, _ = halves("rloo")
    np.testing.assert_allclose(advantages_of(pipeline, [group]), expected, atol=1e-6)


def test_the_dual_clip_of_verl_is_two_sided_clipping():
    # r = 6, A = -1, c = 3: min(6, 3)
    surrogate = partial(clipped, low=0.2, high=0.2, delta=3.0)
    term, slope = gradient_of(surrogate, np.log(6.0), -1.0)
    assert (term.loss.item(), slope) == (pytest.approx(3.0), 0.0)
    for log_ratio in np.linspace(-3, 3, 25):
        for advantage in (1.0, -1.0):
            ours, _ = gradient_of(surrogate, log_ratio, advantage)
            plain, _ = gradient_of(partial(clipped, low=0.2, high=0.2), log_ratio, advantage)
            dual = min(plain.loss.item(), 3.0) if advantage < 0 else plain.loss.item()
            assert ours.loss.item() == pytest.approx(dual)


@pytest.mark.parametrize("name", CLIP_RANGE)
def test_a_bound_of_the_ratio_beyond_the_clip_range_is_the_only_one_accepted(name):
    config = ALGORITHMS[name].config
    if "delta" in config.model_fields:
        high = config().clip_high
        assert config(delta=1.5 + high).delta == 1.5 + high
        with pytest.raises(ValueError, match="delta is"):
            config(delta=1 + high)


def test_the_token_mean_of_the_toy_batch_with_cispo_is_the_one_worked_by_hand():
    _, objective = halves("cispo", ratio_max=5.0)
    loss, _ = toy_loss(objective, A, token_mean)
    # -r A lp: (1.105171 * 0.4 + 0.740818 * 1.3 + 0.2) - (0.7 + 1.221403 * 0.1)
    #          - (1.193460 + 0.4 + 0.849143 + 0.1) + 0.6, over 10 tokens
    assert loss == pytest.approx((1.605132 - 0.822140 - 2.542603 + 0.6) / 10, abs=1e-6)
