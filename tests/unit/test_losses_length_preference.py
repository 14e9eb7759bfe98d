"""The learnable length preference: weights, their gradient, one step of its SGD."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from grpo.group_terms import learnable_weights, with_row_weights
from grpo.length_preference import preference_weights
from grpo.objective import row_policy_losses
from tests.unit.family_cases import (
    differing_points,
    halves,
    loss_and_gradient,
    points,
    row_inputs,
    rows_of,
)
from tests.unit.grpo_groups import (
    LENGTHS,
    NEW,
    OLD,
    flat,
    loss_inputs,
    random_groups,
    toy_group,
)

RULE = partial(preference_weights, scale=1 / 9)
F = {
    -5.0: [0.519363, 0.861067, 0.390376, 2.229194],
    0.0: [1, 1, 1, 1],
    1.0: [1.044487, 0.945677, 1.153622, 0.856214],
    5.0: [0.971719, 0.589756, 2.014072, 0.424453],
}


def exponent(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def toy():
    """The toy batch as the learner gets it: population deviation, eps 0, token mean."""
    pipeline, objective = halves(
        "lambda_grpo_length", num_generations=4, std_ddof=0, std_eps=0, importance_cap=None
    )
    rows = rows_of(pipeline, [toy_group()])
    log_probs = torch.tensor(flat(NEW), requires_grad=True)
    return objective, loss_inputs(rows, log_probs=log_probs, proximal=flat(OLD))


@pytest.mark.parametrize("value", F)
def test_weights_are_those_worked_by_hand(value):
    found = RULE(torch.tensor(LENGTHS), exponent(value))
    np.testing.assert_allclose(found.detach(), F[value], atol=1e-6)
    assert found.sum().item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("value", "loss", "slope", "moved"),
    [(0.0, 0.26672383, 0.05231902, -0.00523190), (1.0, 0.32230609, 0.05954957, 0.99404504)],
)
def test_loss_slope_and_step_of_the_exponent_are_those_worked_by_hand(value, loss, slope, moved):
    objective, inputs = toy()
    learnable, at = objective.learnable, exponent(value)
    weights = learnable_weights(learnable, at, [0] * 4, LENGTHS)
    found, _ = loss_and_gradient(objective, with_row_weights(inputs, weights))
    assert found == pytest.approx(loss, abs=1e-7)
    (gradient,) = torch.autograd.grad((weights * row_policy_losses(objective, inputs)).sum(), at)
    assert gradient.item() == pytest.approx(slope, abs=1e-7)
    step = value - learnable.learning_rate * gradient.item()
    assert step == pytest.approx(moved, abs=1e-7)
    # f_i (u_i - mean_j f_j u_j), u = h^value ln h
    lengths = np.array(LENGTHS, float)
    h = 1 + (lengths - lengths.mean()) / lengths.std() / 9
    u, f = h**value * np.log(h), weights.detach().numpy()
    by_hand = f * (u - (f * u).mean()) @ row_policy_losses(objective, inputs).numpy()
    assert by_hand == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("lengths", [[7, 7, 7, 7], [1], [3, 3, 3]])
def test_equal_lengths_weigh_one_and_teach_the_exponent_nothing(lengths):
    at = exponent(2.0)
    found = RULE(torch.tensor(lengths), at)
    assert found.tolist() == [1.0] * len(lengths)
    (gradient,) = torch.autograd.grad((found * torch.arange(1.0, len(lengths) + 1)).sum(), at)
    assert gradient.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("value", [-40.0, 40.0])
def test_a_length_far_below_the_mean_of_a_large_group_stays_finite(value):
    at = exponent(value)
    found = RULE(torch.tensor([1] + [900] * 199), at)  # z = -14: 1 + z / 9 is below 0
    (gradient,) = torch.autograd.grad(found[0], at)
    assert torch.isfinite(found).all() and torch.isfinite(gradient)
    assert found.sum().item() == pytest.approx(200)


def test_a_positive_exponent_favours_long_answers():
    found = RULE(torch.tensor([1, 2, 3, 4]), exponent(2.0)).detach().numpy()
    assert (np.diff(found) > 0).all()


def test_weights_follow_their_answers_when_these_change_places():
    left = RULE(torch.tensor(LENGTHS), exponent(1.5))
    right = RULE(torch.tensor(LENGTHS[::-1]), exponent(1.5)).flip(0)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "settings",
    [{"exponent_learning_rate": 0.0}, {"length_scale": 0.0, "initial_exponent": 3.0}],
)
def test_an_exponent_that_stays_zero_leaves_grpo_with_a_token_mean(settings):
    found = points("lambda_grpo_length", **settings)
    assert "learnable" not in found
    assert differing_points(found, points("grpo")) == {"aggregation"}


def test_at_exponent_zero_the_loss_is_that_without_it_to_the_last_bit():
    groups = random_groups(0, num_groups=2, num_generations=4)
    pipeline, objective = halves("lambda_grpo_length", num_generations=4)
    rows = rows_of(pipeline, groups)
    inputs = row_inputs(objective, rows)
    weights = learnable_weights(
        objective.learnable, exponent(0.0), [r.group for r in rows], [len(r.tokens) for r in rows]
    )
    weighed = with_row_weights(inputs, weights)
    for left, right in zip(
        loss_and_gradient(objective, weighed), loss_and_gradient(objective, inputs), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert not weighed.policy_weights.requires_grad
