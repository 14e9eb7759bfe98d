"""Members that weigh tokens or domains: numbers worked by hand, neutral settings, state."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo import advantage, domain_weights, gates, penalties, ratios, token_weights
from grpo.algorithms import ALGORITHMS
from grpo.domain_weights import DomainWeights, exponentiated
from grpo.pipeline import RewardedGroup
from grpo.types import StepReport
from orchestration.checkpoint import decoded_state, encoded_state
from tests.unit.family_cases import (
    advantages_of,
    differing_points,
    halves,
    loss_and_gradient,
    points,
    row_inputs,
    rows_of,
)
from tests.unit.grpo_groups import random_groups, rollout, scored, token_inputs

TR = {"alpha": 2.0, "mu": 0.25, "scale": 9.0, "centre": 0.0, "low": 1.0, "high": 1.4}
REPORT = StepReport(metrics={}, timings_s={})


def at_probabilities(*probabilities, **streams):
    log_probs = torch.tensor(np.log(probabilities), dtype=torch.float64, requires_grad=True)
    return token_inputs(log_probs=log_probs, proximal=np.log(probabilities), **streams)


@pytest.mark.parametrize(
    ("weight", "probabilities", "expected"),
    [
        (
            partial(gates.probability_weight, **TR),
            [0.01, 0.1, 0.2, 0.3, 0.5, 0.9],
            [1.0, 1.0, 1.216298, 1.374053, 1.4, 1.4],
        ),
        # the reading p / 9 of a third party does nothing
        (
            partial(gates.probability_weight, **(TR | {"scale": 1 / 9})),
            [0.01, 0.1, 0.2, 0.3, 0.5, 0.9],
            [1.0] * 6,
        ),
        (
            partial(gates.linear_probability_weight, share=0.3),
            [0.01, 0.1, 0.5, 0.9],
            [0.703, 0.73, 0.85, 0.97],
        ),
        # 2 sigmoid(5 (p - 0.4)): 1 at p = 0.4, 2 / (1 + e^-2.5) at 0.9
        (
            partial(
                gates.probability_weight,
                alpha=2.0,
                mu=0.0,
                scale=5.0,
                centre=0.4,
                low=0.0,
                high=2.0,
            ),
            [0.4, 0.9],
            [1.0, 1.848284],
        ),
    ],
)
def test_weights_by_probability_are_those_worked_by_hand(weight, probabilities, expected):
    np.testing.assert_allclose(
        weight(at_probabilities(*probabilities)).detach(), expected, atol=1e-6
    )


@pytest.mark.parametrize(
    ("placement", "p", "a", "loss", "slope"),
    [
        # inside: min(1.4, 1.2) and no gradient; outside 1.4 times the plain term
        ("inside", 0.9, 1.0, -1.2, 0.0),
        ("outside", 0.9, 1.0, -1.4, -1.4),
        ("inside", 0.2, 1.0, -1.2, 0.0),
        ("inside", 0.2, -1.0, 1.216298, 1.216298),
        ("outside", 0.2, -1.0, 1.216298, 1.216298),
    ],
)
def test_where_the_weight_stands_decides_whether_confident_tokens_learn(
    placement, p, a, loss, slope
):
    _, objective = halves("tr_grpo", placement=placement)
    found, gradient = loss_and_gradient(objective, at_probabilities(p, advantages=[a]))
    assert found == pytest.approx(loss, abs=1e-6)
    assert gradient.tolist() == pytest.approx([slope], abs=1e-6)


@pytest.mark.parametrize(("p", "expected"), [(0.05, 0.0), (0.9, 0.063528)])
def test_the_weighted_kl_is_not_zero_where_policy_and_reference_agree(p, expected):
    inputs = at_probabilities(p, reference=[float(np.log(p))])
    weight = partial(gates.probability_weight, **TR)
    assert penalties.weighted_k3(inputs, weight=weight).item() == pytest.approx(expected, abs=1e-6)
    _, objective = halves("tr_grpo", beta=1.0, weighted_kl=True)
    assert objective.penalties[0].fn(inputs).item() == pytest.approx(expected, abs=1e-6)


def test_a_weight_of_one_makes_the_weighted_kl_k3():
    inputs = at_probabilities(0.3, 0.8, reference=[-1.0, -0.4])
    one = partial(gates.linear_probability_weight, share=0.0)
    torch.testing.assert_close(penalties.weighted_k3(inputs, weight=one), penalties.k3(inputs))


@pytest.mark.parametrize(
    "settings",
    [
        {"low": 1.0, "high": 1.0},
        {"low": 1.0, "high": 1.0, "placement": "inside"},
        {"weight": "linear", "share": 0.0},
        {"weight": "linear", "share": 0.0, "placement": "inside"},
    ],
)
def test_a_weight_of_one_makes_tr_grpo_grpo_with_a_token_mean_to_the_last_bit(settings):
    rows = rows_of(halves("tr_grpo")[0], random_groups(0, num_groups=2, num_generations=4))
    ours, theirs = halves("tr_grpo", **settings)[1], halves("grpo")[1]
    inputs = row_inputs(ours, rows)
    for left, right in zip(
        loss_and_gradient(ours, inputs), loss_and_gradient(theirs, inputs), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert differing_points(points("tr_grpo", **settings), points("grpo")) <= {
        "aggregation",
        "gates",
        "log_ratio",
    }


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"low": 1.5}, "must not exceed high"),
        ({"weighted_kl": True, "kl_estimator": "k2"}, "set kl_estimator: k3"),
        ({"low": 0.0, "placement": "inside"}, "must be above 0"),
    ],
)
def test_settings_of_tr_grpo_that_contradict_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        ALGORITHMS["tr_grpo"].config(**settings)


@pytest.mark.parametrize(
    ("kernel", "td", "expected"),
    [
        ("recent", "terminal", [0.125, 0.25, 0.5, 1]),
        ("both_max", "terminal", [1, 0.5, 0.5, 1]),
        ("both_sum", "terminal", [1.125, 0.75, 0.75, 1.125]),
        ("recent", "constant", [1.875, 1.75, 1.5, 1]),
    ],
)
def test_trace_weights_are_those_worked_by_hand(kernel, td, expected):
    group = scored([rollout(0, 4), rollout(1, 6, guidance=2)], answer=[1, 0])
    found = token_weights.trace_weights(group, None, decay=0.5, kernel=kernel, td=td)
    np.testing.assert_allclose(found[0], expected)
    np.testing.assert_allclose(found[1], [1, 1, *expected])  # guidance is no part of the trace
    given = scored([rollout(0, 2, guidance=2)], answer=[1])
    (found,) = token_weights.trace_weights(given, None, decay=0.5, kernel=kernel, td=td)
    assert found.tolist() == [1, 1]


def test_the_first_token_of_a_long_answer_has_next_to_no_weight_under_the_recent_kernel():
    group = scored([rollout(0, 620)], answer=[1])
    (found,) = token_weights.trace_weights(group, None, decay=0.99, kernel="recent", td="terminal")
    np.testing.assert_allclose(found[[0, 310, 619]], [0.001987, 0.0448, 1.0], atol=1e-5)


def traced(x, decay, *, weights=None, row=None):
    log_probs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    inputs = token_inputs(log_probs=log_probs, proximal=[0.0] * len(x))
    if weights is not None:
        inputs = replace(inputs, weights=torch.tensor(weights, dtype=torch.float64))
    if row is not None:
        inputs = replace(inputs, row=torch.tensor(row), num_rows=max(row) + 1)
    return inputs, ratios.traced_log_ratio(inputs, decay=decay)


def test_the_trace_of_log_ratios_is_the_one_worked_by_hand():
    _, trace = traced([0.1, -0.2, 0.05, 0.3], 0.5)
    np.testing.assert_allclose(trace.detach(), [0.1, -0.15, -0.025, 0.2875], atol=1e-12)
    np.testing.assert_allclose(
        trace.detach().exp(), [1.105171, 0.860708, 0.97531, 1.333091], atol=1e-6
    )


def test_a_trace_starts_anew_with_each_answer_and_passes_over_untrained_tokens():
    x = [0.1, -0.2, 9.0, 0.05, 0.3, 1.0, 2.0, 4.0]
    _, trace = traced(x, 0.5, weights=[1, 1, 0, 1, 1, 1, 1, 1], row=[0, 0, 0, 0, 0, 1, 1, 2])
    expected = [0.1, -0.15, 0.0, -0.025, 0.2875, 1.0, 2.5, 4.0]
    np.testing.assert_allclose(trace.detach(), expected, atol=1e-12)


def test_a_trace_follows_the_recursion_on_rows_of_any_length():
    rng = np.random.default_rng(0)
    lengths = [1, 7, 16, 33]
    x = rng.normal(size=sum(lengths))
    _, trace = traced(x, 0.9, row=np.repeat(range(4), lengths))
    expected = []
    for part in np.split(x, np.cumsum(lengths)[:-1]):
        carried = 0.0
        for value in part:
            carried = value + 0.9 * carried
            expected.append(carried)
    np.testing.assert_allclose(trace.detach(), expected, atol=1e-12)


def test_on_policy_the_trace_gives_early_tokens_more_gradient():
    _, objective = halves("grpo_lambda", mode="trace", decay=0.5, importance_cap=None)
    inputs, _ = traced([0.0] * 4, 0.5)
    _, gradient = loss_and_gradient(objective, inputs)
    np.testing.assert_allclose(-gradient, [1.875, 1.75, 1.5, 1.0], atol=1e-12)


def test_a_floor_bounds_negative_advantages_alone():
    group = scored([rollout(i, 1) for i in range(3)], answer=[1, 0, 0.3])

    def given(groups, state):
        return [[np.array([1.2]), np.array([-0.05]), np.array([-0.9])]]

    found = advantage.floored(
        [RewardedGroup(group=group, components=np.zeros((3, 1)))],
        None,
        advantage=given,
        floor=-0.1,
    )
    assert [row.tolist() for row in found[0]] == [[1.2], [-0.05], [-0.1]]


NEUTRAL = {"advantage_floor": None}


@pytest.mark.parametrize(
    "settings",
    [
        {"decay": 1.0, "kernel": "recent"},
        {"decay": 1.0, "kernel": "both_max"},
        {"decay": 0.0, "mode": "trace"},
        {"decay": 0.0, "kernel": "recent", "td": "constant"},
    ],
)
def test_neutral_traces_make_grpo_lambda_grpo_to_the_last_bit(settings):
    groups = random_groups(0, num_groups=2, num_generations=4)
    pipeline, objective = halves("grpo_lambda", **NEUTRAL, **settings)
    ours, theirs = rows_of(pipeline, groups), rows_of(halves("grpo")[0], groups)
    results = [
        loss_and_gradient(objective, row_inputs(objective, ours)),
        loss_and_gradient(halves("grpo")[1], row_inputs(objective, theirs)),
    ]
    np.testing.assert_array_equal(*[loss for loss, _ in results])
    np.testing.assert_array_equal(*[gradient for _, gradient in results])


def test_a_constant_error_is_defined_for_one_kernel():
    with pytest.raises(ValidationError, match="set kernel: recent"):
        ALGORITHMS["grpo_lambda"].config(td="constant")


def in_domain(domain, rewards, *, group=0):
    found = scored([rollout(i, 2) for i in range(len(rewards))], group=group, answer=rewards)
    return replace(found, prompt=replace(found.prompt, domain=domain))


def rewarded(*groups):
    return [
        RewardedGroup(group=g, components=np.array([[np.nan if v is None else v] for v in values]))
        for g in groups
        for values in [g.outcomes("answer")]
    ]


@pytest.mark.parametrize(
    ("losses", "step_size", "q", "loss"),
    [
        ((0.3, 1.0), 0.01, (0.498250, 0.501750), 0.651225),
        ((0.3, 1.0), 1.0, (0.331812, 0.668188), 0.767731),
        ((0.75, 5.0), 0.01, (0.489377, 0.510623), 2.920150),
        ((0.3, 0.0), 1.0, (0.574443, 0.425557), 0.172333),
    ],
)
def test_domain_weights_move_as_worked_by_hand(losses, step_size, q, loss):
    found = exponentiated(
        {"a": 0.5, "b": 0.5}, {"a": losses[0], "b": losses[1]}, step_size=step_size
    )
    assert list(found.values()) == pytest.approx(q, abs=1e-6)
    assert found["a"] * losses[0] + found["b"] * losses[1] == pytest.approx(loss, abs=1e-5)


def test_a_domain_that_is_absent_keeps_its_weight_and_a_new_one_gets_the_mean():
    start = {"a": 0.2, "b": 0.3, "c": 0.5}
    found = exponentiated(start, {"a": 0.0, "b": 1.0}, step_size=1.0)
    assert found["c"] == 0.5
    assert found["a"] + found["b"] == pytest.approx(0.5)
    assert found["b"] / found["a"] == pytest.approx(1.5 * np.e)
    known, groups = DomainWeights(weights={"a": 0.4, "b": 0.6}), rewarded(in_domain("new", [1, 0]))
    state = domain_weights.follow_losses(known, groups, REPORT, step_size=1.0)
    # 0.5 beside a sum of 1
    assert state.weights == pytest.approx({"a": 0.4 / 1.5, "b": 0.4, "new": 0.5 / 1.5})


def test_the_loss_of_a_domain_is_what_its_mean_reward_lacks_to_one():
    groups = rewarded(
        in_domain("easy", [1, 1, 0, 1]),
        in_domain("hard", [0, None]),
        in_domain("easy", [1, 1, 1, 0]),
    )
    state = domain_weights.follow_losses(DomainWeights(weights={}), groups, REPORT, step_size=1.0)
    # losses 0.25 and 1 from weights 0.5 and 0.5
    assert state.weights["hard"] / state.weights["easy"] == pytest.approx(np.exp(0.75))
    assert sum(state.weights.values()) == pytest.approx(1.0)


def test_a_hard_domain_weighs_more_and_an_unseen_one_weighs_as_usual():
    state = DomainWeights(weights={"easy": 0.25, "hard": 0.75})
    weights = [
        domain_weights.domain_weight(in_domain(domain, [1, 0]), state)[0].tolist()
        for domain in ("easy", "hard", "unseen")
    ]
    assert weights == [[0.5, 0.5], [1.5, 1.5], [1.0, 1.0]]
    assert domain_weights.domain_metrics([], state) == {
        "domain_weight/easy": 0.5,
        "domain_weight/hard": 1.5,
    }


def test_a_step_size_of_zero_makes_grpo_robust_grpo_to_the_last_bit():
    groups = [in_domain(d, [1, 0, 0.5], group=i) for i, d in enumerate("aabc")]
    pipeline, _ = halves("grpo_robust", robust_step=0)
    state = pipeline.initial_state
    for _ in range(3):
        state = pipeline.adapt(state, rewarded(*groups), REPORT)
    ours, theirs = rows_of(pipeline, groups, state), rows_of(halves("grpo")[0], groups)
    for row, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row.policy_weights, 1.0, rtol=1e-7)
        np.testing.assert_array_equal(row.advantages, other.advantages)
        np.testing.assert_array_equal(row.weights, other.weights)


def test_the_weights_of_domains_survive_a_checkpoint():
    state = DomainWeights(weights={"a": 0.1 + 0.2, "b": 0.7})
    assert decoded_state(DomainWeights(weights={}), encoded_state(state)) == state


def test_the_weights_leave_the_advantages_of_grpo_as_they_are():
    groups = random_groups(2, num_groups=2, num_generations=4)
    ours = advantages_of(halves("grpo_robust")[0], groups, DomainWeights(weights={}))
    np.testing.assert_array_equal(ours, advantages_of(halves("grpo")[0], groups))
