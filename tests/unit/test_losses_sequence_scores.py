"""DisCO and REBEL: worked numbers, and the gradient of their own losses by plain autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo import penalties
from grpo.algorithms import ALGORITHMS
from grpo.group_terms import replaced_advantages, row_scores
from grpo.objective import RowScore
from grpo.sequence_scores import (
    answer_scores,
    discriminated,
    discrimination,
    pairwise_error,
    regressed,
)
from tests.unit.family_cases import (
    halves,
    loss_and_gradient,
    points,
    row_inputs,
    rows_of,
    toy_inputs,
)
from tests.unit.grpo_groups import REWARDS, rollout, scored

LABELS = np.array([1.0, -1.0, -1.0, 1.0])


def toy_scores(advantages=LABELS):
    return row_scores(toy_inputs(list(advantages)))


def row(log_ratio=0.0, reward=0.0, *, log_prob=0.0, ratio=1.0, num=1):
    return RowScore(
        advantage=reward,
        log_prob_sum=log_prob,
        log_ratio_sum=log_ratio,
        ratio_mean=ratio,
        num_trained=num,
    )


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("log_likelihood", [-0.633333, -0.4, -0.675, -0.6]),
        ("ratio", [0.948663, 1.110701, 1.024589, 1.0]),
    ],
)
def test_the_scores_of_the_toy_batch_are_those_worked_by_hand(score, expected):
    np.testing.assert_allclose(answer_scores(toy_scores(), score=score), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("score", "form", "tau", "value", "wrong"),
    [
        ("log_likelihood", "disco", 10.0, -0.080112, [-0.506875, -0.493125]),
        ("ratio", "disco", 1.0, -0.094240, [-0.521515, -0.478485]),
        ("ratio", "disco", 0.1, -0.102310, [-0.702896, -0.297104]),
        ("ratio", "disco_b", 1.0, -0.0933136, [-0.5, -0.5]),
    ],
)
def test_disco_and_its_gradient_are_those_worked_by_hand(score, form, tau, value, wrong):
    scores = answer_scores(toy_scores(), score=score)
    assert discrimination(scores, LABELS, form=form, tau=tau) == pytest.approx(value, abs=1e-6)
    found = np.array(discriminated(toy_scores(), score=score, form=form, tau=tau)) / 4
    np.testing.assert_allclose(found, [0.5, *wrong, 0.5], atol=1e-6)


@pytest.mark.parametrize("labels", [[1, 1], [-1, -1], [0, 0], [1, 0], [0, -1]])
def test_a_group_without_right_or_without_wrong_answers_is_left_alone(labels):
    rows = [row(reward=label, log_prob=-float(i)) for i, label in enumerate(labels)]
    assert discriminated(rows, score="log_likelihood", form="disco", tau=10.0) == [0.0, 0.0]


def test_scores_of_any_size_leave_weights_that_sum_to_one():
    rows = [row(reward=1), row(reward=-1, log_prob=-1e5), row(reward=-1, log_prob=1e5)]
    found = discriminated(rows, score="log_likelihood", form="disco", tau=0.1)
    np.testing.assert_allclose(found, [3, 0, -3], atol=1e-12)


def test_an_unjudged_answer_is_neither_raised_nor_lowered():
    rows = [row(reward=1), row(reward=0), row(reward=-1)]
    assert discriminated(rows, score="ratio", form="disco_b", tau=1.0) == [3.0, 0.0, -3.0]


def some_groups():
    """Three mixed groups of different lengths, and one in which all are right."""
    rng = np.random.default_rng(3)
    outcomes = [[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    return [
        scored(
            [
                rollout(i, int(n), log_probs=-rng.random(n))
                for i, n in enumerate(rng.integers(1, 6, 4))
            ],
            group=g,
            answer=[float(v) for v in values],
        )
        for g, values in enumerate(outcomes)
    ], outcomes


def learner_gradient(name, **settings):
    """What the learner would do with these groups, and its inputs."""
    groups, outcomes = some_groups()
    pipeline, objective = halves(name, num_generations=4, importance_cap=None, **settings)
    rows = rows_of(pipeline, groups)
    inputs = row_inputs(objective, rows)
    replaced = replaced_advantages(objective.group_term, inputs, [r.group for r in rows])
    _, gradient = loss_and_gradient(objective, replaced)
    return inputs, outcomes, rows, gradient


def by_group(inputs, rows, streams):
    """For each group the named streams of each of its answers."""
    parts = {name: stream.split([len(r.tokens) for r in rows]) for name, stream in streams.items()}
    groups: dict[int, list[dict[str, torch.Tensor]]] = {}
    for place, item in enumerate(rows):
        groups.setdefault(item.group, []).append({n: p[place] for n, p in parts.items()})
    return list(groups.values())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize(("score", "tau"), [("log_likelihood", 10.0), ("ratio", 0.1)])
@pytest.mark.parametrize("form", ["disco", "disco_b"])
def test_the_learner_follows_the_gradient_of_discos_own_loss(score, tau, form, estimator):
    inputs, outcomes, rows, gradient = learner_gradient(
        "disco", score=score, tau=tau, form=form, constraint_estimator=estimator
    )
    now, old = inputs.log_probs, inputs.proximal_log_probs
    total, kls = 0.0, []
    groups = by_group(inputs, rows, {"now": now, "old": old})
    for answers, right in zip(groups, outcomes, strict=True):
        ratios = [a["now"] - a["old"] for a in answers]
        kls += [(-r if estimator == "k1" else r.exp() - 1 - r).mean() for r in ratios]
        means = [a["now"].mean() for a in answers]
        s = torch.stack(means if score == "log_likelihood" else [r.exp().mean() for r in ratios])
        is_right = torch.tensor(right) == 1
        if is_right.all():
            continue
        wrong = s[~is_right]
        low = (
            tau * ((wrong / tau).logsumexp(0) - np.log(len(wrong)))
            if form == "disco"
            else wrong.mean()
        )
        total = total - (s[is_right].mean() - low) / len(outcomes)
    kl = torch.stack(kls).mean()
    half_square = 1000 / 2 * (kl - 1e-4).clamp(min=0).square()
    (expected,) = torch.autograd.grad(total + half_square, now)
    np.testing.assert_allclose(gradient, expected.numpy(), atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kl", "scale", "term"),
    [(0.01, 9.9, 0.099), (0.0005, 0.4, 0.0002), (5e-5, 0.0, 0.0)],
)
def test_the_hinge_of_the_kl_is_the_one_worked_by_hand(kl, scale, term):
    found = 1000 * penalties.beyond(kl, limit=1e-4)
    assert found == pytest.approx(scale, abs=1e-9)
    assert found * kl == pytest.approx(term, abs=1e-9)
    half_square = 500 * max(kl - 1e-4, 0) ** 2
    assert half_square == pytest.approx({0.01: 0.049005, 0.0005: 8e-5, 5e-5: 0.0}[kl], abs=1e-9)


def test_the_kl_from_the_start_is_the_token_mean_worked_by_hand():
    assert penalties.k1_from_start(toy_inputs([0.0] * 4)).mean().item() == pytest.approx(0.01)


def test_on_policy_the_constraint_costs_nothing():
    _, objective = halves("disco", num_generations=4)
    inputs = toy_inputs([0.0] * 4)
    inputs = replace(inputs, proximal_log_probs=inputs.log_probs.detach())
    loss, gradient = loss_and_gradient(objective, inputs)
    assert loss == 0 and not gradient.any()


def test_disco_b_is_grpo_over_the_deviation_of_the_group():
    # A = G * (1 / P, -1 / N) = (1, -1) / share; GRPO's (population) is that times sqrt(p (1 - p))
    rows = [row(reward=label) for label in (1, -1, -1, -1)]
    found = np.array(discriminated(rows, score="ratio", form="disco_b", tau=1.0))
    p = 0.25
    np.testing.assert_allclose(found * np.sqrt(p * (1 - p)), [3**0.5, *[-(3**-0.5)] * 3])


def test_disco_without_a_constraint_has_no_penalty_and_its_settings_are_its_own():
    assert not points("disco", constraint_coef=0)["penalties"]
    text = points("disco")["penalties"]
    assert text[0].startswith("1000 * beyond(limit=0.0001) of its mean * k1_from_start: ")
    with pytest.raises(ValueError, match=r"negative_scale is 0\.5"):
        ALGORITHMS["disco"].config(negative_scale=0.5)


@pytest.mark.parametrize(
    ("rows", "eta", "pairs", "value"),
    [
        ([row(0.5, 1.0), row(-0.2, 0.2)], 1.0, "distinct", 0.01),
        # the released form at eta 2; the printed one, 0.2025, is this over eta^2
        ([row(0.5, 1.0), row(-0.2, 0.2)], 2.0, "distinct", 0.81),
        ([row(0.5, 1), row(-0.2, 0.2), row(0.1, 0), row(0, 1)], 1.0, "all", 0.305),
        ([row(0.5, 1), row(-0.2, 0.2), row(0.1, 0), row(0, 1)], 1.0, "distinct", 0.406667),
        ([row(r - 3, r) for r in (1.0, 0.2, 0.0)], 1.0, "all", 0.0),
        ([row(0.5, 1.0)], 1.0, "distinct", 0.0),
    ],
)
def test_the_error_over_pairs_is_the_one_worked_by_hand(rows, eta, pairs, value):
    assert pairwise_error(rows, eta=eta, pairs=pairs) == pytest.approx(value, abs=1e-6)


def test_the_printed_form_of_rebel_is_the_released_one_over_eta_squared():
    rows = [row(0.5, 1.0), row(-0.2, 0.2)]
    printed = ((0.5 + 0.2) / 2 - 0.8) ** 2
    assert printed == pytest.approx(0.2025)
    assert pairwise_error(rows, eta=2.0, pairs="distinct") == pytest.approx(4 * printed)


def test_at_the_start_rebel_is_grpo_without_deviation_and_length():
    rows = [row(0.0, r) for r in (1.0, 0.2, 0.0, 1.0)]
    found = -np.array(regressed(rows, eta=1.0, pairs="all")) / 4
    np.testing.assert_allclose(found, [-0.45, 0.35, 0.55, -0.45], atol=1e-12)


def test_rebel_is_blind_to_a_constant_of_a_group_and_to_a_lonely_answer():
    rows = [row(0.5, 1), row(-0.2, 0.2), row(0.1, 0)]
    moved = [row(r.log_ratio_sum + 3, r.advantage - 2) for r in rows]
    found = [regressed(part, eta=0.7, pairs="distinct") for part in (rows, moved)]
    np.testing.assert_allclose(*found, atol=1e-12)
    assert regressed([row(0.5, 1.0)], eta=1.0, pairs="distinct") == [0.0]


@pytest.mark.parametrize("pairs", ["distinct", "all"])
def test_the_learner_follows_the_gradient_of_rebels_own_loss(pairs):
    inputs, outcomes, rows, gradient = learner_gradient(
        "rebel", pairs=pairs, eta=0.7, kl_in_reward=0
    )
    streams = {"x": inputs.log_probs - inputs.proximal_log_probs}
    total = 0.0
    for answers, rewards in zip(by_group(inputs, rows, streams), outcomes, strict=True):
        s = torch.stack([a["x"].sum() for a in answers])
        r = torch.tensor(rewards, dtype=torch.float64)
        gaps = (s[:, None] - s[None, :]) - 0.7 * (r[:, None] - r[None, :])
        num_pairs = 16 if pairs == "all" else 12
        total = total + gaps.square().sum() / num_pairs / len(outcomes)
    (expected,) = torch.autograd.grad(total, inputs.log_probs)
    np.testing.assert_allclose(gradient, expected.numpy(), atol=1e-6 * float(expected.abs().max()))


def test_an_answer_without_a_reward_takes_no_part_in_the_regression():
    group = scored([rollout(i, 2 + i) for i in range(3)], answer=[1.0, None, 0.0])
    pipeline, _ = halves("rebel", num_generations=3)
    rows = rows_of(pipeline, [group])
    assert [bool(r.weights.any()) for r in rows] == [True, False, True]


def test_the_kl_term_of_rebel_is_in_the_reward_and_needs_the_reference():
    pipeline, objective = halves("rebel")
    assert [m.name for m in pipeline.measures] == ["reference"]
    assert [m.name for m in objective.measures] == ["reference"]
    bare, plain = halves("rebel", kl_in_reward=0)
    assert bare.measures == plain.measures == ()
    assert len(bare.rewards) == len(pipeline.rewards) - 1


def test_the_toy_batch_has_one_reward_per_answer():
    assert list(np.where(LABELS > 0, 1.0, 0.0)) == REWARDS


@pytest.mark.parametrize(("pairs", "slope"), [("distinct", 0.4), ("all", 0.2)])
def test_two_answers_are_regressed_on_each_other(pairs, slope):
    # x = 0.5 - 1 and -0.2 - 0.2: -0.05 and 0.05 about their mean, times -4, twice for distinct
    found = regressed([row(0.5, 1.0), row(-0.2, 0.2)], eta=1.0, pairs=pairs)
    np.testing.assert_allclose(found, [slope, -slope], atol=1e-12)
