"""What every member accepts: corrections for mismatch, KL estimators, and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo import gates, penalties
from grpo.algorithms import ALGORITHMS
from tests.unit.family_cases import points, toy_inputs
from tests.unit.grpo_groups import ENGINE, NEW, REFERENCE, flat, token_inputs

# rho = exp(OLD - ENGINE) of the toy batch: per token, product per answer, geometric mean per answer
TOKEN = [1, 3.320117, 1, 1, 1, 1, 1, 0.67032, 1, 1.491825]
PRODUCT = np.repeat([3.320117, 1.0, 0.67032, 1.491825], [3, 2, 4, 1])


def mismatch():
    return toy_inputs([1.0, -1.0, -1.0, 1.0], behaviour=flat(ENGINE))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (partial(gates.truncated_importance, cap=2.0), np.minimum(TOKEN, 2)),
        (partial(gates.truncated_sequence_importance, cap=2.0), np.minimum(PRODUCT, 2)),
        (partial(gates.masked_importance, low=0.5, high=2.0), [1, 0, *TOKEN[2:]]),
        (partial(gates.masked_importance, low=0.5, high=5.0), TOKEN),
        (partial(gates.masked_importance, low=0.7, high=5.0), [*TOKEN[:7], 0, *TOKEN[8:]]),
        (
            partial(gates.masked_sequence_importance, low=0.0, high=3.0),
            [0, 0, 0, *PRODUCT[3:]],
        ),
        # geometric means 1.491825, 1, 0.904837, 1.491825: the first and last answer go
        (
            partial(gates.geometric_filter, low=0.8, high=1.3),
            [0, 0, 0, *TOKEN[3:9], 0],
        ),
    ],
)
def test_corrections_of_the_toy_batch_are_those_worked_by_hand(gate, expected):
    np.testing.assert_allclose(gate(mismatch()).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "gate",
    [
        partial(gates.truncated_sequence_importance, cap=2.0),
        partial(gates.masked_importance, low=0.5, high=2.0),
        partial(gates.masked_sequence_importance, low=0.5, high=2.0),
        partial(gates.geometric_filter, low=0.5, high=2.0),
        partial(gates.off_policy_filter, delta=0.5),
    ],
)
def test_a_correction_is_one_where_all_policies_agree_and_finite_where_they_are_far_apart(gate):
    agreeing = token_inputs(log_probs=[-1.0] * 2, proximal=[-1.0] * 2)
    assert gate(agreeing).tolist() == [1.0, 1.0]
    apart = token_inputs(log_probs=[-1.0] * 2, proximal=[-900.0, -1.0], behaviour=[-1.0, -900.0])
    assert torch.isfinite(gate(apart)).all()


def test_an_answer_to_be_punished_is_left_alone_once_the_policy_has_left_it():
    # means of ENGINE - NEW: (-0.1 - 0.9 + 0) / 3, -0.2 / 2, (-0.4 + 0.9) / 4, -0.4
    gap = [np.mean(np.subtract(e, n)) for e, n in zip(ENGINE, NEW, strict=True)]
    assert gap == pytest.approx([-1.0 / 3, -0.1, 0.125, -0.4])
    inputs = toy_inputs([1.0, -1.0, -1.0, 1.0], behaviour=flat(ENGINE))
    kept = gates.off_policy_filter(inputs, delta=0.1)
    assert kept.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    one = token_inputs(log_probs=[-1.0], proximal=[-1.0], behaviour=[-0.5], advantages=[-1.0])
    assert gates.off_policy_filter(one, delta=0.5).tolist() == [1]  # 0.5 does not exceed 0.5
    good = toy_inputs([1.0, -1.0, 1.0, 1.0], behaviour=flat(ENGINE))
    assert gates.off_policy_filter(good, delta=0.1).tolist() == [1] * 10


@pytest.mark.parametrize(
    ("penalty", "d", "value", "gradient"),
    [
        (penalties.k3_plus, 0.3, 0.040818, 0.3),
        (penalties.k3_plus, -0.3, 0.049859, -0.3),
        (penalties.k3_plus, 0.0, 0.0, 0.0),
        # on policy the ratio is 1 and its gradient adds the value itself: 0.040818 + 0.259182
        (penalties.k3_unbiased, 0.3, 0.040818, 0.3),
        (penalties.k3_unbiased, 0.0, 0.0, 0.0),
    ],
)
def test_the_other_kl_estimates_are_those_worked_by_hand(penalty, d, value, gradient):
    log_probs = torch.tensor([d - 1.0], dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=log_probs, proximal=[d - 1.0], reference=[-1.0])
    found = penalty(inputs).sum()
    (slope,) = torch.autograd.grad(found, log_probs)
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert slope.item() == pytest.approx(gradient, abs=1e-6)


def test_the_unbiased_kl_of_the_toy_batch_has_the_mean_worked_by_hand():
    inputs = toy_inputs([1.0] * 4, reference=flat(REFERENCE))
    assert penalties.k3_unbiased(inputs).mean().item() == pytest.approx(0.0188218, abs=1e-7)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "truncated_importance(cap=2)"),
        ({"importance_level": "sequence"}, "truncated_sequence_importance(cap=2)"),
        ({"correction": "mis", "importance_cap": 3.0}, "masked_importance(low=0, high=3)"),
        (
            {"correction": "mis", "importance_floor": 0.5, "importance_cap": 5.0},
            "masked_importance(low=0.5, high=5)",
        ),
        (
            {"correction": "mis", "importance_level": "sequence"},
            "masked_sequence_importance(low=0, high=2)",
        ),
        (
            {"correction": "mis", "importance_level": "geometric"},
            "geometric_filter(low=0, high=2)",
        ),
        ({"off_policy_delta": 0.5}, "off_policy_filter(delta=0.5)"),
    ],
)
def test_every_member_accepts_every_correction(name, settings, line):
    assert any(text.startswith(f"{line}: ") for text in points(name, **settings)["gates"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"importance_floor": 0.5}, "set correction: mis"),
        ({"importance_level": "geometric"}, "weighs nothing"),
        ({"correction": "mis", "importance_cap": None}, "give it a bound"),
        ({"correction": "mis", "importance_floor": 3.0}, "must lie below importance_cap = 2"),
    ],
)
def test_a_correction_that_contradicts_itself_is_refused_with_the_remedy(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        ALGORITHMS["grpo"].config(**settings)
