"""Group terms and the learnable scalar on plain tensors, against autograd over the whole group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.group_terms import (
    group_advantages,
    learnable_weights,
    learned_value,
    replaced_advantages,
    row_scores,
    with_row_weights,
)
from grpo.objective import (
    Learnable,
    LossInputs,
    Measure,
    Objective,
    Penalty,
    ReferenceUpdate,
    RowScore,
    Signal,
    loss_and_metrics,
    row_policy_losses,
)
from grpo.objective_checks import needs_reference, refuse_impossible
from grpo.penalties import k3
from grpo.ratios import token_log_ratio
from grpo.surrogates import clipped, log_likelihood
from tests.unit.family_cases import loss_and_gradient, toy_inputs
from tests.unit.grpo_groups import LENGTHS, OLD, REWARDS

CLIPPED = Objective(log_ratio=token_log_ratio, surrogate=partial(clipped, low=0.2, high=0.2))
UNCLIPPED = Objective(log_ratio=token_log_ratio, surrogate=partial(clipped, low=1.0, high=1e9))
LOG_LIKELIHOOD = Objective(log_ratio=token_log_ratio, surrogate=log_likelihood)


def contrast(rows: Sequence[RowScore], *, by_ratio: bool, tau: float) -> list[float]:
    """d/ds of mean_P [s - tau log mean_N exp(s / tau)]; advantages that arrive are labels."""
    scores = [row.ratio_mean if by_ratio else row.log_prob_sum / row.num_trained for row in rows]
    wrong = [np.exp(s / tau) for s, row in zip(scores, rows, strict=True) if row.advantage <= 0]
    num_right = len(rows) - len(wrong)
    return [
        1 / num_right if row.advantage > 0 else -np.exp(s / tau) / sum(wrong)
        for s, row in zip(scores, rows, strict=True)
    ]


def contrast_loss(scores: Tensor, *, tau: float) -> Tensor:
    right, wrong = scores[[0, 3]], scores[[1, 2]]
    return -(right - tau * torch.logsumexp(wrong / tau, 0) + tau * np.log(2)).mean()


def regression(rows: Sequence[RowScore], *, eta: float) -> list[float]:
    """Minus d/ds of the mean of ((s_i - s_j) - eta (r_i - r_j))^2 over all ordered pairs."""
    gaps = np.array([row.log_ratio_sum - eta * row.advantage for row in rows])
    return list(-4 / len(rows) * (gaps - gaps.mean()))


def regression_loss(sums: Tensor, rewards: Tensor, *, eta: float) -> Tensor:
    gaps = sums - eta * rewards
    return (gaps[:, None] - gaps[None]).square().mean()


def sums(values: Tensor, row: Tensor) -> Tensor:
    return values.new_zeros(4).index_add(0, row, values)


def sequence_means(inputs: LossInputs) -> LossInputs:
    """Weight 1 / length on each token of the toy batch."""
    return replace(inputs, weights=torch.tensor(1 / np.repeat(np.array(LENGTHS, float), LENGTHS)))


def test_row_scores_of_the_toy_batch_are_those_worked_by_hand() -> None:
    scores = row_scores(toy_inputs(REWARDS))
    assert [score.num_trained for score in scores] == LENGTHS
    assert [score.advantage for score in scores] == REWARDS
    # -0.4 - 1.3 - 0.2, -0.7 - 0.1, ...
    assert [score.log_prob_sum for score in scores] == pytest.approx([-1.9, -0.8, -2.7, -0.6])
    assert [score.log_ratio_sum for score in scores] == pytest.approx([-0.2, 0.2, -0.1, 0.0])
    # DisCO's L-ratio scores: (e^0.1 + e^-0.3 + 1) / 3, ...
    expected = [0.948663, 1.110701, 1.024589, 1.0]
    assert [score.ratio_mean for score in scores] == pytest.approx(expected, abs=1e-6)


def test_untrained_tokens_are_in_no_row_score() -> None:
    inputs = toy_inputs([1.0, 2.0, 3.0, 4.0])
    weights = torch.ones(10, dtype=torch.float64)
    weights[[1, 9]] = 0.0  # the second token of the first answer, all of the last
    first, *_, last = row_scores(replace(inputs, weights=weights))
    assert first.num_trained == 2
    assert first.log_prob_sum == pytest.approx(-0.6)
    assert first.ratio_mean == pytest.approx((np.exp(0.1) + 1) / 2)
    assert (last.num_trained, last.log_prob_sum, last.ratio_mean, last.advantage) == (0, 0, 0, 0)


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.1])
def test_a_term_on_mean_log_likelihoods_has_the_gradient_of_its_own_loss(tau: float) -> None:
    inputs = sequence_means(toy_inputs(REWARDS))
    term = partial(contrast, by_ratio=False, tau=tau)
    _, gradient = loss_and_gradient(LOG_LIKELIHOOD, replaced_advantages(term, inputs, [7] * 4))
    own = contrast_loss(sums(inputs.log_probs * inputs.weights, inputs.row), tau=tau)
    (expected,) = torch.autograd.grad(own, inputs.log_probs)
    np.testing.assert_allclose(gradient, expected, atol=1e-15)


@pytest.mark.parametrize(
    ("tau", "wrong"), [(1.0, [-0.521515, -0.478485]), (0.1, [-0.702896, -0.297104])]
)
def test_a_term_on_mean_ratios_has_the_gradient_of_its_own_loss(tau: float, wrong: list) -> None:
    inputs = sequence_means(toy_inputs(REWARDS))
    term = partial(contrast, by_ratio=True, tau=tau)
    replaced = replaced_advantages(term, inputs, [7] * 4)
    np.testing.assert_allclose(replaced.advantages[[0, 3, 5, 9]], [0.5, *wrong, 0.5], atol=1e-6)
    _, gradient = loss_and_gradient(UNCLIPPED, replaced)
    ratios = (inputs.log_probs - inputs.proximal_log_probs).exp()
    own = contrast_loss(sums(ratios * inputs.weights, inputs.row), tau=tau)
    (expected,) = torch.autograd.grad(own, inputs.log_probs)
    np.testing.assert_allclose(gradient, expected, atol=1e-15)


@pytest.mark.parametrize("eta", [1.0, 2.0])
def test_a_regression_on_pairs_has_the_gradient_of_its_own_loss(eta: float) -> None:
    inputs = toy_inputs([1.0, 0.2, 0.0, 1.0])
    term = partial(regression, eta=eta)
    _, gradient = loss_and_gradient(LOG_LIKELIHOOD, replaced_advantages(term, inputs, [0] * 4))
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    rewards = torch.tensor([1.0, 0.2, 0.0, 1.0], dtype=torch.float64)
    own = regression_loss(sums(log_ratio, inputs.row), rewards, eta=eta)
    (expected,) = torch.autograd.grad(own, inputs.log_probs)
    np.testing.assert_allclose(gradient, expected, atol=1e-15)


def test_a_regression_on_pairs_starts_as_grpo_without_its_deviation() -> None:
    # -(4 / 4) (r - 0.55) is the gradient on each row's log-ratio.
    rows = [
        RowScore(
            advantage=reward, log_prob_sum=0.0, log_ratio_sum=0.0, ratio_mean=1.0, num_trained=1
        )
        for reward in [1.0, 0.2, 0.0, 1.0]
    ]
    assert regression(rows, eta=1.0) == pytest.approx([0.45, -0.35, -0.55, 0.45])


def test_every_group_is_shown_to_the_term_alone_and_in_its_own_order() -> None:
    seen: list[list[float]] = []

    def remembered(rows: Sequence[RowScore]) -> list[float]:
        seen.append([row.advantage for row in rows])
        return [10 * row.advantage for row in rows]

    scores = row_scores(toy_inputs([1.0, 2.0, 3.0, 4.0]))
    assert group_advantages(remembered, [5, 3, 5, 3], scores) == [10.0, 20.0, 30.0, 40.0]
    assert seen == [[1.0, 3.0], [2.0, 4.0]]


def test_a_row_without_a_trained_token_is_shown_to_no_term() -> None:
    inputs = toy_inputs([1.0, 2.0, 3.0, 4.0])
    weights = inputs.weights.masked_fill(inputs.row == 1, 0.0)
    scores = row_scores(replace(inputs, weights=weights))
    assert group_advantages(lambda rows: [len(rows)] * len(rows), [0] * 4, scores) == [3, 0, 3, 3]
    assert group_advantages(lambda rows: [1 / len(rows)], [0, 1, 2, 3], scores) == [1, 0, 1, 1]


def test_a_term_that_returns_too_few_advantages_is_refused() -> None:
    with pytest.raises(ValueError, match="returned 1 advantages for 4 rows of group 6"):
        replaced_advantages(lambda rows: [0.0], toy_inputs(REWARDS), [6] * 4)


def softmax_of_powers(lengths: Tensor, value: Tensor) -> Tensor:
    """G softmax(h^value), h = 1 + z / 9 (arXiv:2510.06870), z with the population deviation."""
    deviation = lengths.std(unbiased=False)
    if deviation == 0:
        return value.new_ones(len(lengths))
    height = 1 + (lengths - lengths.mean()) / deviation / 9
    return len(lengths) * height.pow(value).softmax(0)


LENGTH_PREFERENCE = Learnable(
    name="length_preference", initial=0.0, learning_rate=0.1, weights=softmax_of_powers
)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("value", "loss", "after"),
    [(0.0, 0.26672383, -0.00523190), (1.0, 0.32230609, 0.99404504)],
)
def test_the_learnable_scalar_moves_as_worked_by_hand(
    value: float, loss: float, after: float
) -> None:
    inputs = toy_inputs([1.0, -1.0, -1.0, 1.0])
    inputs = replace(inputs, weights=inputs.weights / 10)
    start = leaf(value)
    weights = learnable_weights(LENGTH_PREFERENCE, start, [0] * 4, LENGTHS)
    weighted = with_row_weights(inputs, weights)
    assert loss_and_metrics(CLIPPED, weighted)[0].item() == pytest.approx(loss, abs=1e-8)
    losses = row_policy_losses(CLIPPED, inputs)
    moved = learned_value(LENGTH_PREFERENCE, start, weights, losses)
    assert moved == pytest.approx(after, abs=1e-8)


def test_the_gradient_of_the_scalar_is_that_of_the_whole_loss_by_autograd() -> None:
    inputs = toy_inputs([1.0, -1.0, -1.0, 1.0])
    objective = replace(CLIPPED, gates=(_probability,))
    start = leaf(-5.0)
    weights = learnable_weights(LENGTH_PREFERENCE, start, [0, 1, 0, 1], LENGTHS)
    losses = row_policy_losses(objective, inputs)
    moved = learned_value(LENGTH_PREFERENCE, start, weights, losses)
    own = leaf(-5.0)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    of_pairs = [softmax_of_powers(lengths[pair], own) for pair in ([0, 2], [1, 3])]
    by_row = torch.stack([of_pairs[0][0], of_pairs[1][0], of_pairs[0][1], of_pairs[1][1]])
    whole = replace(inputs, policy_weights=by_row[inputs.row])
    (gradient,) = torch.autograd.grad(loss_and_metrics(objective, whole)[0], own)
    assert gradient.abs() > 1e-3
    assert moved == pytest.approx(-5.0 - 0.1 * gradient.item(), abs=1e-14)


def _probability(inputs: LossInputs) -> Tensor:
    return inputs.log_probs.exp()


def test_equal_lengths_neither_weigh_nor_move_the_scalar() -> None:
    start = leaf(1.0)
    weights = learnable_weights(LENGTH_PREFERENCE, start, [0, 0, 1, 1], [3, 3, 2, 2])
    assert weights.tolist() == [1.0] * 4
    assert learned_value(LENGTH_PREFERENCE, start, weights, torch.ones(4)) == 1.0


def test_a_row_without_a_trained_token_weighs_one_and_is_in_no_mean() -> None:
    weights = learnable_weights(LENGTH_PREFERENCE, leaf(1.0), [0] * 5, [*LENGTHS, 0])
    expected = [1.044487, 0.945677, 1.153622, 0.856214, 1.0]
    np.testing.assert_allclose(weights.detach(), expected, atol=1e-6)


def test_row_weights_scale_the_policy_term_and_no_penalty() -> None:
    inputs = toy_inputs([1.0, -1.0, -1.0, 1.0], reference=np.concatenate(OLD).tolist())
    plain = CLIPPED.surrogate(token_log_ratio(inputs), inputs).loss
    penalised = replace(CLIPPED, penalties=(Penalty(name="kl", coefficient=1.0, fn=k3),))
    weighted = with_row_weights(inputs, torch.tensor([2.0, 0.0, 0.0, 0.0]))
    loss, metrics = loss_and_metrics(penalised, weighted)
    assert metrics["policy_loss"].item() == pytest.approx(2 * plain[:3].sum().item())
    assert (loss - metrics["policy_loss"]).item() == pytest.approx(k3(inputs).sum().item())


def answers(rows: Sequence[object], layer: object) -> list[Tensor]:
    raise AssertionError("never called")


MEASURE = Measure(name="reference", fn=answers, needs=frozenset({Signal.REFERENCE}))
FOLLOWING = replace(
    CLIPPED, measures=(MEASURE,), reference_update=ReferenceUpdate(every=10, decay=0.995)
)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (replace(CLIPPED, needs=frozenset({Signal.HIDDEN})), "only a measure can read them"),
        (replace(CLIPPED, measures=(MEASURE, MEASURE)), r"several measures called \['reference'\]"),
        (replace(FOLLOWING, measures=()), "neither its loss nor a measure reads"),
        (replace(FOLLOWING, reference_update=ReferenceUpdate(every=0, decay=0.5)), "every 0 steps"),
        (replace(FOLLOWING, reference_update=ReferenceUpdate(every=1, decay=1.0)), "decay 1.0"),
        (replace(CLIPPED, stage=FOLLOWING), r"\['measures', 'reference_update'\]"),
        (replace(CLIPPED, stage=replace(CLIPPED, stage=CLIPPED)), r"\['stage'\]"),
        (
            replace(CLIPPED, learnable=replace(LENGTH_PREFERENCE, learning_rate=-0.1)),
            "learning rate -0.1",
        ),
        (replace(CLIPPED, learnable=replace(LENGTH_PREFERENCE, initial=np.nan)), "starts at nan"),
    ],
)
def test_what_no_learner_can_do_is_refused_with_the_remedy(objective: Objective, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_impossible(objective)


def test_what_a_learner_can_do_is_not_refused() -> None:
    for objective in (CLIPPED, FOLLOWING, replace(FOLLOWING, stage=CLIPPED)):
        refuse_impossible(objective)


def test_a_reference_is_kept_for_losses_measures_and_stages_that_read_it() -> None:
    reading = replace(CLIPPED, needs=frozenset({Signal.REFERENCE}))
    assert not needs_reference(CLIPPED)
    assert needs_reference(reading)
    assert needs_reference(FOLLOWING)
    assert needs_reference(replace(CLIPPED, stage=reading))
