"""Reward terms for the length of an answer, to be added to the terms of the scorers.

Right: the weighted sum of the raw outcomes is above 0. NaN where no scorer judged. An answer's
length is its completion tokens, end of sequence included. Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grpo.errors import UserError
from grpo.pipeline import State
from grpo.rewards import total_outcome
from grpo.types import Float64, Group


def relative_length(
    group: Group, state: State, *, weights: Mapping[str, float], coefficient: float
) -> Float64:
    """Kimi k1.5: 0.5 - (length - shortest) / (longest - shortest), for wrong answers never above 0.

    Lengths 100, 200, 300, 400, right, wrong, right, wrong: 0.5, 0, -0.1667, -0.5. Equal lengths: 0.
    """
    rewards, lengths = total_outcome(group, weights=weights), _lengths(group)
    spread = np.ptp(lengths)
    if spread == 0:
        return np.where(np.isnan(rewards), np.nan, 0.0)
    bonus = 0.5 - (lengths - lengths.min()) / spread
    return coefficient * _judged(rewards, np.where(rewards > 0, bonus, np.minimum(bonus, 0.0)))


def distance_to_shortest_right(
    group: Group, state: State, *, weights: Mapping[str, float], coefficient: float
) -> Float64:
    """ShorterBetter: -|length - shortest right length|, or - mean length (arXiv:2504.21370).

    Lengths 300, 100, 200, 50, right, wrong, right, wrong: -100, -100, 0, -150 times coefficient.
    """
    rewards, lengths = total_outcome(group, weights=weights), _lengths(group)
    is_right = rewards > 0
    target = lengths[is_right].min() if is_right.any() else lengths.mean()
    return coefficient * _judged(rewards, -np.abs(lengths - target))


def distance_to_budget(
    group: Group,
    state: State,
    *,
    weights: Mapping[str, float],
    coefficient: float,
    column: str,
) -> Float64:
    """L1-Exact: -|budget - length| (arXiv:2503.04697); the budget is a column of the prompt.

    Budget 1000, length 1500, coefficient 0.0003: -0.15.
    """
    rewards = total_outcome(group, weights=weights)
    return coefficient * _judged(rewards, -np.abs(_budget(group, column) - _lengths(group)))


def within_budget(
    group: Group,
    state: State,
    *,
    weights: Mapping[str, float],
    coefficient: float,
    column: str,
) -> Float64:
    """L1-Max: what turns reward into reward * clip(coefficient * (budget - length) + 0.5, 0, 1).

    The paper's form (arXiv:2503.04697). Budget 1000, coefficient 0.0003, a right answer of reward 1
    and length 0, 1000, 2000, 3000: -0.2, -0.5, -0.8, -1. A wrong answer's reward is 0 or less and
    stays.
    """
    rewards = total_outcome(group, weights=weights)
    slack = _budget(group, column) - _lengths(group)
    share = np.clip(coefficient * slack + 0.5, 0.0, 1.0)
    return _judged(rewards, np.maximum(rewards, 0.0) * (share - 1.0))


def _judged(rewards: Float64, values: Float64) -> Float64:
    return np.where(np.isnan(rewards), np.nan, values)


def _lengths(group: Group) -> Float64:
    return np.array([rollout.num_tokens for rollout in group.rollouts], np.float64)


def _budget(group: Group, column: str) -> float:
    columns = group.prompt.columns
    value = columns[column] if column in columns else None
    if not isinstance(value, int | float):
        raise UserError(
            f"prompt {group.prompt.id!r} has {value!r} in column {column!r}; the length reward "
            "needs the budget in tokens there, as a number: add it to the data, or set "
            "algorithm.length_budget_column"
        )
    return float(value)
