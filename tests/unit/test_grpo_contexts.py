"""Tokens sampled after another context, or written by another policy: ratios, losses, weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo import gates, surrogates
from grpo.objective import LossInputs
from grpo.ratios import cross_context_log_ratio, token_log_ratio
from grpo.types import Origin
from tests.unit.family_cases import toy_inputs
from tests.unit.grpo_groups import ENGINE, flat, token_inputs

PLAIN = partial(surrogates.clipped, low=0.2, high=0.2)
# Guide-GRPO: pi(token | prompt) / pi_old(token | prompt, hint) of one answer
RATIOS = [0.2, 1.0, 0.5, 0.25]
GAMMA = 0.85  # their 90th percentile


def hinted_inputs(**streams: object) -> LossInputs:
    """One answer sampled after a hint; the policy has not moved since the start of the step."""
    now = torch.tensor(np.log(RATIOS) - 0.5, requires_grad=True)
    inputs = token_inputs(
        log_probs=now, proximal=now.tolist(), behaviour=[-0.5] * 4, advantages=[1.0] * 4
    )
    return replace(inputs, is_cross_context=torch.ones(4, dtype=torch.bool), **streams)


def test_the_ratio_across_contexts_is_taken_to_what_was_sampled() -> None:
    np.testing.assert_allclose(
        cross_context_log_ratio(hinted_inputs()).exp().detach(), RATIOS, atol=1e-12
    )


def test_in_one_context_the_ratio_is_the_ordinary_one() -> None:
    inputs = toy_inputs([1.0] * 4, behaviour=flat(ENGINE).tolist())
    assert torch.equal(cross_context_log_ratio(inputs), token_log_ratio(inputs))
    mixed = replace(inputs, is_cross_context=inputs.row == 3)
    # -0.6 now, -0.6 at the start of the step, -1.0 after the other context
    assert cross_context_log_ratio(mixed)[9].item() == pytest.approx(0.4)
    assert torch.equal(cross_context_log_ratio(mixed)[:9], token_log_ratio(inputs)[:9])


def shaped(gamma: float | None, inputs: LossInputs) -> tuple[np.ndarray, np.ndarray]:
    """Loss after the policy weight, and its gradient."""
    surrogate = partial(
        surrogates.by_context, same=PLAIN, other=partial(surrogates.shaped_ratio, gamma=gamma)
    )
    term = surrogate(cross_context_log_ratio(inputs), inputs)
    assert not (term.clipped_low | term.clipped_high).any()
    loss = term.loss * inputs.policy_weights
    (gradient,) = torch.autograd.grad(loss.sum(), inputs.log_probs)
    return loss.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("own_gamma", [False, True])
def test_the_shaped_ratio_has_the_values_and_gradients_of_the_reference(own_gamma: bool) -> None:
    inputs = hinted_inputs()
    if own_gamma:
        inputs = replace(inputs, policy_weights=torch.full((4,), GAMMA, dtype=torch.float64))
    loss, gradient = shaped(None if own_gamma else GAMMA, inputs)
    np.testing.assert_allclose(loss, [-0.190476, -0.540541, -0.37037, -0.227273], atol=1e-6)
    np.testing.assert_allclose(gradient, [-0.154195, -0.248356, -0.233196, -0.17562], atol=1e-6)


def test_a_token_without_policy_weight_has_neither_loss_nor_gradient() -> None:
    weights = torch.tensor([0.0, GAMMA, 0.0, GAMMA], dtype=torch.float64)
    loss, gradient = shaped(None, hinted_inputs(policy_weights=weights))
    np.testing.assert_allclose(loss, [0, -0.540541, 0, -0.227273], atol=1e-6)
    np.testing.assert_allclose(gradient, [0, -0.248356, 0, -0.17562], atol=1e-6)


@pytest.mark.parametrize(
    ("probability", "value", "gradient"),
    [
        (0.01, 0.090909, 0.082645),
        (0.1, 0.5, 0.25),
        (0.5, 0.833333, 0.138889),
        (1.0, 0.909091, 0.082645),
    ],
)
def test_the_shaped_probability_has_the_values_and_gradients_of_the_reference(
    probability: float, value: float, gradient: float
) -> None:
    now = torch.tensor([np.log(probability)], requires_grad=True)
    inputs = token_inputs(log_probs=now, proximal=[-5.0], advantages=[1.0])
    term = surrogates.shaped_probability(token_log_ratio(inputs), inputs, gamma=0.1)
    (found,) = torch.autograd.grad(term.loss.sum(), now)
    assert term.loss.item() == pytest.approx(-value, abs=1e-6)
    assert found.item() == pytest.approx(-gradient, abs=1e-6)


def test_what_was_given_and_what_the_policy_wrote_have_losses_of_their_own() -> None:
    # Two rows of three and four tokens: a demonstration and an answer.
    now = torch.tensor(np.log([0.1, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5]), requires_grad=True)
    ratio = np.log([1.2, 0.8, 1.0, 1.0])
    inputs = token_inputs(
        log_probs=now,
        proximal=[-9.0] * 3 + (now.detach().numpy()[3:] - ratio).tolist(),
        advantages=[0.5] * 3 + [-0.5] * 4,
    )
    origins = torch.tensor([Origin.GUIDANCE] * 3 + [Origin.POLICY] * 4, dtype=torch.uint8)
    guidance = partial(surrogates.shaped_probability, gamma=0.1)
    free = partial(surrogates.clipped, low=1.0, high=1e9)
    inputs = replace(inputs, origins=origins)
    term = surrogates.by_origin(token_log_ratio(inputs), inputs, policy=free, guidance=guidance)
    expected = [-0.25, -0.416667, -0.45, 0.6, 0.4, 0.5, 0.5]
    np.testing.assert_allclose(term.loss.detach(), expected, atol=1e-6)
    assert term.loss.sum().item() / 4 == pytest.approx(0.220833, abs=1e-6)  # 4: longest answer


def test_clipping_is_reported_for_the_loss_that_was_chosen() -> None:
    inputs = toy_inputs([1.0, 1.0, 1.0, 1.0])
    other = partial(surrogates.shaped_ratio, gamma=1.0)
    inputs = replace(inputs, is_cross_context=inputs.row == 2)
    term = surrogates.by_context(token_log_ratio(inputs), inputs, same=PLAIN, other=other)
    # ratios above 1.2: e^0.2 of the second answer, e^0.4 of the third
    assert term.clipped_high.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    "gate",
    [
        partial(gates.truncated_importance, cap=2.0),
        partial(gates.truncated_sequence_importance, cap=0.5),
        partial(gates.masked_importance, low=0.9, high=1.1),
        partial(gates.masked_sequence_importance, low=0.9, high=1.1),
        partial(gates.geometric_filter, low=0.9, high=1.1),
        partial(gates.off_policy_filter, delta=-9.0),
    ],
)
def test_importance_is_one_where_another_context_was_sampled_from(gate) -> None:
    inputs = toy_inputs([-1.0] * 4, behaviour=flat(ENGINE).tolist())
    crossing = gate(replace(inputs, is_cross_context=inputs.row != 1))
    assert crossing[[0, 1, 2, 5, 6, 7, 8, 9]].tolist() == [1.0] * 8
    assert torch.equal(crossing[3:5], gate(inputs)[3:5])  # the others are as they were
    assert gate(inputs)[[1, 7, 9]].tolist() != [1.0] * 3
