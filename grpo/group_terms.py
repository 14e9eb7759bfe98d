"""What an objective computes over whole groups: advantages by `group_term`, weights by `learnable`.

Works on plain tensors through their methods; the learner and `covey explain` call the same
functions. Refuses to know how rows were packed and shared out. N tokens, R rows, G rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo.objective import GroupTerm, Learnable, LossInputs, RowScore
from grpo.rows import trained_tokens

if TYPE_CHECKING:
    from torch import Tensor


def row_scores(inputs: LossInputs) -> list[RowScore]:
    """Each row in numbers, in double precision, over its trained tokens. [R]

    Log-probabilities -0.4 and -1.3 now, -0.5 and -1.0 at the start of the step: log_prob_sum -1.7,
    log_ratio_sum -0.2, ratio_mean (e^0.1 + e^-0.3) / 2 = 0.923. A row without a trained token has
    sums and means of 0.
    """
    trained = trained_tokens(inputs)
    row = inputs.row[trained]

    def row_sum(values: Tensor) -> Tensor:
        counted = values.detach()[trained].double()
        return counted.new_zeros(inputs.num_rows).index_add(0, row, counted)

    log_ratio = inputs.log_probs.double() - inputs.proximal_log_probs.double()
    count = row_sum(trained.double())
    several = count.clamp(min=1.0)
    streams = zip(
        (row_sum(inputs.advantages) / several).tolist(),
        row_sum(inputs.log_probs).tolist(),
        row_sum(log_ratio).tolist(),
        (row_sum(log_ratio.exp()) / several).tolist(),
        count.tolist(),
        strict=True,
    )
    return [
        RowScore(
            advantage=advantage,
            log_prob_sum=log_prob_sum,
            log_ratio_sum=log_ratio_sum,
            ratio_mean=ratio_mean,
            num_trained=int(num_trained),
        )
        for advantage, log_prob_sum, log_ratio_sum, ratio_mean, num_trained in streams
    ]


def group_advantages(
    term: GroupTerm, groups: Sequence[int], scores: Sequence[RowScore]
) -> list[float]:
    """The new advantage of each row; `groups` says which group it is of. [R]

    A row without a trained token is not shown to the term and has advantage 0.
    """
    advantages = [0.0] * len(scores)
    for rows in _rows_by_group(groups, [score.num_trained for score in scores]):
        values = term([scores[row] for row in rows])
        if len(values) != len(rows):
            raise ValueError(
                f"the group term returned {len(values)} advantages for {len(rows)} rows of group "
                f"{groups[rows[0]]}: it must return one for each"
            )
        for row, value in zip(rows, values, strict=True):
            advantages[row] = float(value)
    return advantages


def with_advantages(inputs: LossInputs, advantages: Sequence[float]) -> LossInputs:
    """The same tokens with the advantage of their row. `advantages` [R]"""
    per_row = inputs.advantages.new_tensor(advantages)
    return replace(inputs, advantages=per_row[inputs.row])


def replaced_advantages(term: GroupTerm, inputs: LossInputs, groups: Sequence[int]) -> LossInputs:
    """The inputs of whole groups, with the advantages that the term gives them. `groups` [R]"""
    return with_advantages(inputs, group_advantages(term, groups, row_scores(inputs)))


def learnable_weights(
    learnable: Learnable, value: Tensor, groups: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """The weight of each row as a function of the scalar `value`, with gradient. [R]

    `lengths` counts trained tokens; a row without any weighs 1 and is not shown to the function.
    """
    weights = value.new_ones(len(groups))
    for rows in _rows_by_group(groups, lengths):
        of_group = learnable.weights(value.new_tensor([lengths[row] for row in rows]), value)
        if of_group.shape != (len(rows),):
            raise ValueError(
                f"the weights of {learnable.name} have shape {tuple(of_group.shape)} for the "
                f"{len(rows)} rows of group {groups[rows[0]]}: expected ({len(rows)},)"
            )
        weights = weights.index_copy(0, value.new_tensor(rows).long(), of_group)
    return weights


def with_row_weights(inputs: LossInputs, weights: Tensor) -> LossInputs:
    """The same tokens, their policy term weighed by their row; no gradient. `weights` [R]"""
    per_row = weights.detach().to(inputs.policy_weights)
    return replace(inputs, policy_weights=inputs.policy_weights * per_row[inputs.row])


def learned_value(
    learnable: Learnable, value: Tensor, weights: Tensor, row_losses: Tensor
) -> float:
    """The scalar after an update: value - rate * d(sum of weight * row loss) / d(value).

    `weights` [R] of `learnable_weights`, `row_losses` [R] the policy term of each row at weight 1
    (`objective.row_policy_losses`). Value 1, gradient 0.0595, rate 0.1: 0.99405.
    """
    total = (weights * row_losses.detach().to(weights)).sum()
    if not total.requires_grad:  # no group's weights depend on the value
        return value.item()
    value.grad = None
    total.backward()  # type: ignore[no-untyped-call]  # torch has not annotated it
    assert value.grad is not None
    return value.item() - learnable.learning_rate * value.grad.item()


def _rows_by_group(groups: Sequence[int], num_trained: Sequence[int]) -> list[list[int]]:
    """Rows with a trained token, by group, in the order in which they come."""
    found: dict[int, list[int]] = {}
    for row, (group, count) in enumerate(zip(groups, num_trained, strict=True)):
        if count:
            found.setdefault(group, []).append(row)
    return list(found.values())
