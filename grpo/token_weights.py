"""Which tokens are trained, and how much. A mask takes a token out of the loss, the penalties and
the mean; a weight scales its policy term.

Refuses to know rewards. Shapes: T tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from grpo.pipeline import PerToken, State
from grpo.rewards import is_judged
from grpo.types import Bool, Group, Origin


def policy_tokens_only(group: Group, state: State) -> list[Bool]:
    """Only what the policy wrote, the end-of-sequence token included."""
    return [rollout.origins == Origin.POLICY for rollout in group.rollouts]


def judged_only(group: Group, state: State) -> list[Bool]:
    """No token of an answer that no scorer judged."""
    return [
        np.full(rollout.num_tokens, judged)
        for rollout, judged in zip(group.rollouts, is_judged(group), strict=True)
    ]


def not_truncated(group: Group, state: State) -> list[Bool]:
    """DAPO's overlong filtering: no token of an answer that the token budget cut off.

    The answer's reward still counts in its group's mean and deviation (arXiv:2503.14476
    section 3.4).
    """
    return [np.full(rollout.num_tokens, not rollout.is_truncated) for rollout in group.rollouts]


def not_end_of_sequence(group: Group, state: State) -> list[Bool]:
    """All but the token with which the policy ended its answer; a cut-off answer has none."""
    return [
        np.arange(rollout.num_tokens) < rollout.num_tokens - (not rollout.is_truncated)
        for rollout in group.rollouts
    ]


def no_token(group: Group, state: State) -> list[Bool]:
    """Nothing is trained: another kind of update does it all."""
    return [np.zeros(rollout.num_tokens, bool) for rollout in group.rollouts]


def constant(group: Group, state: State, *, value: float) -> PerToken:
    """The same weight on every token. [T]"""
    return [np.full(rollout.num_tokens, value) for rollout in group.rollouts]


def trace_weights(
    group: Group,
    state: State,
    *,
    decay: float,
    kernel: Literal["recent", "both_max", "both_sum"],
    td: Literal["terminal", "constant"],
) -> PerToken:
    """What an eligibility trace leaves of an answer's credit at each token, reconstructed. [T]

    Of token t of the T that the policy wrote: td terminal, kernel recent: decay^(T-1-t); both: its
    maximum, or sum, with decay^t; td constant: 1 + decay + ... + decay^(T-1-t). T = 4, decay 0.5:
    0.125, 0.25, 0.5, 1; 1, 0.5, 0.5, 1; 1.125, 0.75, 0.75, 1.125; 1.875, 1.75, 1.5, 1.
    """
    weights = []
    for rollout in group.rollouts:
        is_own = rollout.origins == Origin.POLICY
        powers = decay ** np.arange(int(is_own.sum()), dtype=np.float64)
        recent = np.cumsum(powers)[::-1] if td == "constant" else powers[::-1]
        along = np.ones(rollout.num_tokens)
        along[is_own] = {
            "recent": recent,
            "both_max": np.maximum(recent, powers),
            "both_sum": recent + powers,
        }[kernel]
        weights.append(along)
    return weights
