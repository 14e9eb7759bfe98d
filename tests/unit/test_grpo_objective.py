"""The learner's half: surrogate, gate, penalties, their gradients, and sums over parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo import gates, penalties
from grpo.objective import Objective, Penalty, loss_and_metrics
from grpo.ratios import token_log_ratio
from grpo.surrogates import clipped
from tests.unit.grpo_groups import ENGINE, NEW, OLD, REFERENCE, flat, token_inputs


def one_token(ratio, advantage, *, low=0.2, high=0.2, delta=None):
    """Surrogate of one token and the gradient of its loss on the log-probability."""
    log_probs = torch.tensor([float(np.log(ratio))], dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=log_probs, proximal=[0.0], advantages=[advantage])
    term = clipped(token_log_ratio(inputs), inputs, low=low, high=high, delta=delta)
    (gradient,) = torch.autograd.grad(term.loss.sum(), log_probs)
    return term, term.loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "loss", "gradient"),
    [
        (1.25, 1.0, 0.2, -1.2, 0.0),
        (1.25, 1.0, 0.28, -1.25, -1.25),  # clip-higher lets it through
        (1.25, -1.0, 0.2, 1.25, 1.25),
        (0.7, 1.0, 0.2, -0.7, -0.7),
        (0.7, -1.0, 0.2, 0.8, 0.0),
        (1.0, 1.0, 0.2, -1.0, -1.0),
        (1.0, -2.0, 0.2, 2.0, 2.0),
    ],
)
def test_the_clipped_loss_and_its_gradient_are_those_worked_by_hand(
    ratio, advantage, high, loss, gradient
):
    _, found, slope = one_token(ratio, advantage, high=high)
    assert found == pytest.approx(loss, abs=1e-12)
    assert slope == pytest.approx(gradient, abs=1e-12)


def test_two_sided_clipping_bounds_what_a_negative_advantage_can_weigh():
    # r = 6, A = -1: 6 without a bound, 4 with delta 4, and no gradient beyond the bound
    assert one_token(6.0, -1.0)[1:] == pytest.approx((6.0, 6.0))
    term, loss, gradient = one_token(6.0, -1.0, delta=4.0)
    assert (loss, gradient) == (4.0, 0.0)
    assert term.clipped_high.tolist() == [True]


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.5, 3.9])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_two_sided_bound_that_is_not_reached_changes_no_bit(ratio, advantage):
    assert one_token(ratio, advantage, delta=4.0)[1:] == one_token(ratio, advantage)[1:]


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_low", "is_high"),
    [
        (0.7, -1.0, True, False),
        (0.7, 1.0, False, False),
        (1.25, 1.0, False, True),
        (1.25, -1.0, False, False),
        (1.25, 0.0, False, False),
        (1.1, 1.0, False, False),
        (1.1, -1.0, False, False),
        (0.9, 1.0, False, False),
        (0.9, -1.0, False, False),
    ],
)
def test_clipping_is_reported_exactly_where_it_stops_the_gradient(
    ratio, advantage, is_low, is_high
):
    term, _, gradient = one_token(ratio, advantage)
    assert (term.clipped_low.item(), term.clipped_high.item()) == (is_low, is_high)
    assert (gradient == 0.0) == (is_low or is_high or advantage == 0.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_against_the_gradient_follows_the_sign_of_the_advantage(advantage):
    _, _, gradient = one_token(1.05, advantage)
    assert np.sign(-gradient) == np.sign(advantage)


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_an_extreme_ratio_gives_finite_loss_and_gradient_in_single_precision(log_ratio, advantage):
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    inputs = replace(
        token_inputs(log_probs=log_probs, proximal=[0.0]), advantages=torch.tensor([advantage])
    )
    loss = clipped(log_probs - 0.0, inputs, low=0.2, high=0.2).loss.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_probs.grad).all()


def test_truncated_importance_weights_of_the_toy_batch_are_those_worked_by_hand():
    inputs = token_inputs(log_probs=flat(NEW), proximal=flat(OLD), behaviour=flat(ENGINE))
    # exp(-1.0 + 2.2) = 3.320 -> 2; exp(-0.9 + 0.5) = 0.670320; exp(-0.6 + 1.0) = 1.491825
    expected = [1, 2, 1, 1, 1, 1, 1, 0.670320, 1, 1.491825]
    found = gates.truncated_importance(inputs, cap=2.0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_gate_is_one_where_both_policies_agree_and_survives_overflow():
    inputs = token_inputs(log_probs=[0.0] * 2, proximal=[-1.5, 0.0], behaviour=[-1.5, -200.0])
    assert gates.truncated_importance(inputs, cap=3.0).tolist() == [1.0, 3.0]


def test_no_gradient_flows_through_a_gate():
    log_probs = torch.tensor([-0.5, -1.0], dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=log_probs, proximal=[-0.5, -1.1], advantages=[1.0, -1.0])

    def probability(given):
        return given.log_probs.exp()

    def same_number(given):
        return torch.tensor([-0.5, -1.0], dtype=torch.float64).exp()

    gradients = []
    for gate in (probability, same_number):
        objective = Objective(
            log_ratio=token_log_ratio,
            surrogate=partial(clipped, low=0.2, high=0.2),
            gates=(gate,),
        )
        loss, _ = loss_and_metrics(objective, inputs)
        gradients.append(torch.autograd.grad(loss, log_probs)[0].tolist())
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize(
    ("penalty", "d", "value", "gradient"),
    [
        (penalties.k2, 0.3, 0.045, 0.3),
        (penalties.k2, -0.3, 0.045, -0.3),
        (penalties.k2, 0.0, 0.0, 0.0),
        (penalties.k3, 0.3, 0.040818, 0.259182),
        (penalties.k3, -0.3, 0.049859, -0.349859),
        (penalties.k3, 0.0, 0.0, 0.0),
    ],
)
def test_kl_estimates_and_their_gradients_are_those_worked_by_hand(penalty, d, value, gradient):
    log_probs = torch.tensor([d - 1.0], dtype=torch.float64, requires_grad=True)
    found = penalty(token_inputs(log_probs=log_probs, proximal=[0.0], reference=[-1.0])).sum()
    (slope,) = torch.autograd.grad(found, log_probs)
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert slope.item() == pytest.approx(gradient, abs=1e-6)


def test_k3_of_the_toy_batch_has_the_mean_worked_by_hand():
    inputs = token_inputs(log_probs=flat(NEW), proximal=flat(OLD), reference=flat(REFERENCE))
    assert penalties.k3(inputs).mean().item() == pytest.approx(0.0216028, abs=1e-7)


def test_k3_of_a_token_that_the_policy_has_all_but_lost_is_bounded_in_single_precision():
    log_probs = torch.tensor([-500.0], requires_grad=True)
    inputs = replace(
        token_inputs(log_probs=log_probs, proximal=[0.0]), reference_log_probs=torch.tensor([0.0])
    )
    value = penalties.k3(inputs).sum()
    value.backward()
    assert value.item() == 10.0
    assert torch.isfinite(log_probs.grad).all()


def test_a_penalty_is_untouched_by_gates_policy_weights_and_advantages():
    inputs = token_inputs(
        log_probs=flat(NEW), proximal=flat(OLD), behaviour=flat(ENGINE), reference=flat(REFERENCE)
    )
    objective = Objective(
        log_ratio=token_log_ratio,
        surrogate=partial(clipped, low=0.2, high=0.2),
        gates=(partial(gates.truncated_importance, cap=2.0),),
        penalties=(Penalty(name="kl", coefficient=0.5, fn=penalties.k3),),
    )
    silenced = replace(inputs, policy_weights=torch.zeros(10, dtype=torch.float64))
    loss, metrics = loss_and_metrics(objective, silenced)
    assert metrics["kl"].item() == pytest.approx(10 * 0.0216028, abs=1e-6)
    assert loss.item() == pytest.approx(5 * 0.0216028, abs=1e-6)


def test_entropy_as_a_penalty_with_a_negative_coefficient_rewards_entropy():
    entropy = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    inputs = replace(token_inputs(log_probs=[-1.0] * 2, proximal=[-1.0] * 2), entropy=entropy)
    objective = Objective(
        log_ratio=token_log_ratio,
        surrogate=partial(clipped, low=0.2, high=0.2),
        penalties=(Penalty(name="entropy", coefficient=-0.1, fn=penalties.entropy),),
    )
    loss, metrics = loss_and_metrics(objective, inputs)
    assert metrics["entropy"].item() == pytest.approx(1.2)
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.1, -0.1])


def test_the_shares_of_clipped_tokens_are_weighted_as_the_loss_is():
    inputs = token_inputs(
        log_probs=np.log([1.25, 0.7, 0.7, 1.0]).tolist(),
        proximal=[0.0] * 4,
        advantages=[1.0, -1.0, 1.0, 1.0],
    )
    inputs = replace(inputs, weights=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    objective = Objective(log_ratio=token_log_ratio, surrogate=partial(clipped, low=0.2, high=0.2))
    loss, metrics = loss_and_metrics(objective, inputs)
    # losses -1.2, 0.8, -0.7, -1
    assert {name: value.item() for name, value in metrics.items()} == {
        "policy_loss": pytest.approx(-0.57),
        "clip_ratio/low": pytest.approx(0.2),
        "clip_ratio/high": pytest.approx(0.1),
    }
    assert loss.item() == pytest.approx(-0.57)
