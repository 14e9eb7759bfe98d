"""From the rewards of the groups of a step to one advantage per token.

Rollouts without a reward (NaN) are left out of every mean and deviation and get advantage 0.
Groups whose rewards are equal get exactly 0, never round-off divided by eps.
Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo.pipeline import Advantage, PerToken, RewardedGroup, State
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


def leave_one_out(groups: Sequence[RewardedGroup], state: State) -> list[PerToken]:
    """RLOO: reward minus the mean of the other answers of the group (arXiv:2402.14740).

    Rewards 1, 0, 0, 1: 2/3, -2/3, -2/3, 2/3.
    """
    return [
        every_token(rewarded.group, leave_one_out_values(rewarded.rewards)) for rewarded in groups
    ]


def accepted(groups: Sequence[RewardedGroup], state: State) -> list[PerToken]:
    """RAFT: the reward where it is positive, else 0: only good answers are imitated."""
    return [
        every_token(rewarded.group, np.nan_to_num(np.maximum(rewarded.rewards, 0.0)))
        for rewarded in groups
    ]


def right_or_wrong(
    groups: Sequence[RewardedGroup], state: State, *, threshold: float
) -> list[PerToken]:
    """Reinforce-Rej: 1 above the threshold, else -1; 0 in a group without both (arXiv:2504.11343).

    The sign is set here, since rewards of 0 and 1 would leave no negative signal.
    """
    return [every_token(rewarded.group, _signs(rewarded.rewards, threshold)) for rewarded in groups]


def floored(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage, floor: float
) -> list[PerToken]:
    """Another advantage, nowhere below the floor.

    Floor -0.1: 1.2, -0.05, -0.9 become 1.2, -0.05, -0.1.
    """
    return [[np.maximum(values, floor) for values in group] for group in advantage(groups, state)]


def negative_scaled(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage, scale: float
) -> list[PerToken]:
    """Another advantage whose negative values are multiplied by `scale` (0: only good answers).

    A knob of arXiv:2404.14367, which finds that a negative gradient helps. Scale 0.5: 1, -1 become
    1, -0.5.
    """
    return [
        [np.where(values < 0, scale * values, values) for values in group]
        for group in advantage(groups, state)
    ]


def leave_one_out_values(rewards: Float64) -> Float64:
    """G / (G - 1) times the centred rewards, G of those present. [G]"""
    num_present = int((~np.isnan(rewards)).sum())
    return centred_values(rewards) * num_present / max(num_present - 1, 1)


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


def _signs(rewards: Float64, threshold: float) -> Float64:
    signs = np.where(np.isnan(rewards), np.nan, np.where(rewards > threshold, 1.0, -1.0))
    return np.zeros_like(rewards) if is_constant(signs) else np.nan_to_num(signs)
