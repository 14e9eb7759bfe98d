"""From the scores of a group to its reward terms; each term is one column of the rewards.

NaN says that a term does not apply to a rollout; it never becomes a number on the way to the
advantage. Shapes: G rollouts in a group.
"""

from __future__ import annotations

import numpy as np

from grpo.pipeline import State
from grpo.types import Float64, Group

# Below this spread rewards are equal and what is left of them is round-off.
CONSTANT_RANGE = 1e-8


def outcome_values(group: Group, *, scorer: str) -> Float64:
    """What the scorer said of each whole answer; NaN where it did not apply. [G]"""
    values = group.outcomes(scorer)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def is_constant(values: Float64) -> bool:
    """Whether the values that are there (not NaN) are equal, none and one included."""
    present = values[~np.isnan(values)]
    return len(present) < 2 or float(present.max() - present.min()) <= CONSTANT_RANGE


def weighted_outcome(group: Group, state: State, *, scorer: str, weight: float) -> Float64:
    """Weight times the score of the whole answer; NaN where the scorer does not apply. [G]"""
    return weight * outcome_values(group, scorer=scorer)


def soft_overlong(group: Group, state: State, *, max_tokens: int, cache_tokens: int) -> Float64:
    """DAPO's soft punishment of long answers (arXiv:2503.14476 eq. 13). [G]

    With n tokens, L max_tokens and c cache_tokens: 0 up to L - c, then (L - c - n) / c, -1 beyond
    L. L = 100, c = 20: 80 -> 0, 90 -> -0.5, 100 -> -1. NaN for a rollout that no scorer judged:
    a penalty of 0 alone would turn "not judged" into "wrong".
    """
    lengths = np.array([rollout.num_tokens for rollout in group.rollouts], np.float64)
    penalty = np.clip((max_tokens - cache_tokens - lengths) / cache_tokens, -1.0, 0.0)
    judged = {score.span.rollout for score in group.scores if score.value is not None}
    is_judged = np.array([place in judged for place in range(len(group.rollouts))], bool)
    return np.where(is_judged, penalty, np.nan)
