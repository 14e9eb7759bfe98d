"""A penalty behind a hinge: one coefficient for the whole update, however it is cut up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo import penalties, surrogates
from grpo.objective import Objective, Penalty, loss_and_metrics
from grpo.ratios import token_log_ratio
from grpo.scaled_penalties import has_scales, scaled_penalty_sums, with_scales
from learner.policy import load_policy
from learner.torch_backend import TorchBackend
from learner.update import Trainee, run_step
from tests.unit.family_cases import toy_inputs
from tests.unit.grpo_groups import token_inputs
from tests.unit.learner_cases import batch_of, random_rows, torch_config, write_model

HINGE = Penalty(
    name="kl_from_start",
    coefficient=1000.0,
    fn=penalties.k1_from_start,
    scale=partial(penalties.beyond, limit=1e-4),
)
HELD = Objective(log_ratio=token_log_ratio, surrogate=surrogates.log_likelihood, penalties=(HINGE,))


def meaned(inputs):
    return replace(inputs, weights=torch.full_like(inputs.weights, 0.1))


def test_the_coefficient_is_that_of_the_sum_over_all_parts():
    assert has_scales(HELD) and not has_scales(replace(HELD, penalties=()))
    fixed = with_scales(HELD, [{"kl_from_start": 0.004}, {}, {"kl_from_start": 0.006}])
    assert not has_scales(fixed)
    assert fixed.penalties[0].coefficient == pytest.approx(9.9)
    assert with_scales(HELD, []).penalties[0].coefficient == 0.0


def test_the_term_of_the_loss_and_its_gradient_are_those_worked_by_hand():
    # the KL of the toy batch is 0.01: coefficient 9.9, term 0.099, gradient -9.9 / 10 per token
    inputs = meaned(toy_inputs([0.0] * 4))
    assert scaled_penalty_sums(HELD, inputs)["kl_from_start"] == pytest.approx(0.01)
    for objective in (HELD, with_scales(HELD, [scaled_penalty_sums(HELD, inputs)])):
        loss, metrics = loss_and_metrics(objective, inputs)
        (gradient,) = torch.autograd.grad(loss, inputs.log_probs)
        assert loss.item() == pytest.approx(0.099)
        assert metrics["kl_from_start"].item() == pytest.approx(0.01)
        np.testing.assert_allclose(gradient, [-0.99] * 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("scaled") / "model")


def weights_after(model, updates, max_tokens):
    policy = load_policy(model, torch_config(), temperature=1.0)
    trainee = Trainee(
        backend=TorchBackend(policy, torch_config()),
        # k3 is never negative, so that the hinge is open whatever the rows are
        objective=replace(HELD, penalties=(replace(HINGE, fn=penalties.k3_from_start),)),
        reference=None,
        config=torch_config(max_tokens_per_microbatch=max_tokens),
        rank=0,
        ranks=1,
    )
    report = run_step(trainee, batch_of(*updates), learning_rate=1e-2)
    return report.metrics, [w.detach().clone() for w in policy.model.parameters()]


def test_micro_batches_do_not_change_how_far_the_hinge_is_open(model):
    rows = random_rows(8)
    updates = (rows[:4], rows[4:])
    whole, expected = weights_after(model, updates, 10_000)
    parts, found = weights_after(model, updates, 30)
    assert whole["kl_from_start"] > 1e-3  # the second update feels what the first one did
    assert parts["kl_from_start"] == pytest.approx(whole["kl_from_start"], rel=1e-3)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


def test_k3_from_the_start_of_the_step_by_hand():
    now = torch.tensor([-0.4, -0.9], dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=now, proximal=[-0.5, -0.5])
    found = penalties.k3_from_start(inputs)
    # exp(0.1) - 1 - 0.1 and exp(-0.4) - 1 + 0.4; slopes exp(0.1) - 1 and exp(-0.4) - 1
    np.testing.assert_allclose(found.detach(), [0.0051709, 0.0703200], atol=1e-6)
    found.sum().backward()
    np.testing.assert_allclose(now.grad, [0.1051709, -0.3296800], atol=1e-6)
