"""From the rewards of the groups of a step to one advantage per token.

Rollouts without a reward (NaN) are left out of every mean and deviation and get advantage 0.
Groups whose rewards are equal get exactly 0, never round-off divided by eps.
Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import is_constant
from grpo.types import Float64, Group


def standardized(
    groups: Sequence[RewardedGroup], state: State, *, ddof: int, eps: float
) -> list[PerToken]:
    """GRPO: (reward - group mean) / (group standard deviation + eps), the same on every token.

    arXiv:2402.03300 section 4.1.2 writes std(r) without more. Published trainers take the sample
    deviation (ddof 1). Rewards 1, 0, 0, 1 with ddof 1 and eps 0: 0.866, -0.866, -0.866, 0.866.
    """
    return [
        every_token(rewarded.group, standardized_values(rewarded.rewards, ddof=ddof, eps=eps))
        for rewarded in groups
    ]


def centred(groups: Sequence[RewardedGroup], state: State) -> list[PerToken]:
    """Dr. GRPO: reward - group mean, the same on every token (arXiv:2503.20783)."""
    return [every_token(rewarded.group, centred_values(rewarded.rewards)) for rewarded in groups]


def standardized_values(rewards: Float64, *, ddof: int, eps: float) -> Float64:
    """Centred rewards over their deviation; 0 where constant or missing. [G]"""
    if is_constant(rewards):
        return np.zeros_like(rewards)
    return centred_values(rewards) / (np.nanstd(rewards, ddof=ddof) + eps)


def centred_values(rewards: Float64) -> Float64:
    """Rewards minus the mean of those present; 0 where constant or missing. [G]"""
    if is_constant(rewards):
        return np.zeros_like(rewards)
    return np.where(np.isnan(rewards), 0.0, rewards - np.nanmean(rewards))


def every_token(group: Group, values: Float64) -> PerToken:
    """One value per rollout, repeated over its tokens."""
    return [
        np.full(rollout.num_tokens, value)
        for rollout, value in zip(group.rollouts, values, strict=True)
    ]
