"""Advantages whose statistics span all groups of a step: whitened, rescaled, decoupled.

Rollouts without a reward (NaN) are left out of every mean and deviation and get advantage 0. What
is equal gets exactly 0, never round-off divided by eps. Shapes: T tokens, G rollouts in a group, K
reward terms, P groups in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from grpo.advantage import centred_values, every_token, standardized_values
from grpo.pipeline import Advantage, PerToken, RewardedGroup, State
from grpo.rewards import CONSTANT_RANGE, is_constant, log_ratio_to_reference
from grpo.types import Float64, Origin

WHITENING_EPS = 1e-8  # verl's, added to the variance; it decides nothing where rewards differ


def whitened(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    baseline: Literal["none", "group"],
    gamma: float,
    kl_coef: float | None = None,
) -> list[PerToken]:
    """REINFORCE++: returns minus their mean over all tokens of the step, over their deviation.

    The return of a token is gamma^(tokens after it) * reward (arXiv:2501.03262); with baseline
    "group" the group's mean is taken off first and every token gets the rest. Whitening counts
    tokens, so long answers weigh more in the mean. Sample variance, as in verl. With `kl_coef` each
    token also earns -kl_coef * k1 to the reference, and the return sums gamma^(tokens between).
    Rewards 1, 0, 0, 1 of lengths 3, 2, 4, 1: 1.1619, -0.7746, -0.7746, 1.1619.
    """
    returns = [
        [
            np.full(rollout.num_tokens, value) * gamma ** np.arange(rollout.num_tokens)[::-1]
            for rollout, value in zip(item.group.rollouts, values, strict=True)
        ]
        for item in groups
        for values in [item.rewards if baseline == "none" else _centred_or_nan(item.rewards)]
    ]
    if kl_coef is not None:
        returns = [
            [
                row - kl_coef * _discounted_sums(log_ratio_to_reference(rollout), gamma)
                for rollout, row in zip(item.group.rollouts, rows, strict=True)
            ]
            for item, rows in zip(groups, returns, strict=True)
        ]
    return whitened_over_tokens(groups, returns)


def rescaled(groups: Sequence[RewardedGroup], state: State) -> list[PerToken]:
    """GPG: (reward - group mean) * P / (P - groups whose rewards are equal) (arXiv:2504.02546).

    The scale makes up for groups that teach nothing. All groups equal: 0.
    """
    num_useful = sum(not is_constant(item.rewards) for item in groups)
    scale = len(groups) / max(num_useful, 1)
    return [every_token(item.group, scale * centred_values(item.rewards)) for item in groups]


def step_standardized(
    groups: Sequence[RewardedGroup], state: State, *, ddof: int, eps: float
) -> list[PerToken]:
    """Lite PPO: (reward - group mean) / (deviation of all rewards of the step + eps).

    arXiv:2508.08221; TRL's scale_rewards "batch". Rewards 1, 0 and 1, 1 with ddof 1 and eps 0:
    1, -1, 0, 0.
    """
    rewards = np.concatenate([item.rewards for item in groups])
    if is_constant(rewards):
        return [every_token(item.group, np.zeros(len(item.rewards))) for item in groups]
    scale = 1 / (np.nanstd(rewards, ddof=ddof) + eps)
    return [every_token(item.group, centred_values(item.rewards) * scale) for item in groups]


def invariant(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage, penalty: float
) -> list[PerToken]:
    """Another advantage, larger on prompts that go badly (after arXiv:2310.11971).

    Prompts whose mean reward is at least the median of the step make one half, the others the
    other; the weights are `invariance_weights`, not below 0. Halves of equal reward: no change.
    """
    means = np.array([_mean(item.rewards) for item in groups], np.float64)
    present = means[~np.isnan(means)]
    middle = np.median(present) if len(present) else 0.0
    rewards = [item.rewards[~np.isnan(item.rewards)] for item in groups]
    is_high = means >= middle
    labels = [np.full(len(r), float(high)) for r, high in zip(rewards, is_high, strict=True)]
    weights = invariance_weights(np.concatenate(rewards), np.concatenate(labels), penalty=penalty)
    ends = np.cumsum([0, *[len(r) for r in rewards]])
    factors = [
        max(float(weights[start]), 0.0) if stop > start else 1.0 for start, stop in pairwise(ends)
    ]
    return [
        [factor * values for values in rows]
        for rows, factor in zip(advantage(groups, state), factors, strict=True)
    ]


def invariance_weights(rewards: Float64, is_high: Float64, *, penalty: float) -> Float64:
    """Gradient of mean reward - penalty * variance of the two halves' rewards, times N. [N]

    Rewards 1, 2, 3, 6 that belong to the high half by 0.1, 0.2, 0.8, 0.9, penalty 0.5: 1.92, 1.69,
    0.31, 0.08. An empty half: 1 everywhere.
    """
    shares = np.stack([1 - is_high, is_high])
    sizes = shares.sum(axis=1, keepdims=True)
    if not sizes.all():
        return np.ones_like(rewards)
    shares = shares / sizes
    returns = shares @ rewards
    slopes: Float64 = (returns - returns.mean()) @ shares
    return 1 - len(rewards) * penalty * slopes


def decoupled(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    weights: Sequence[float],
    ddof: int,
    eps: float,
    batch_norm: Literal["rollouts", "tokens"],
) -> list[PerToken]:
    """GDPO: standardise each reward term in its group, sum by weight, standardise over the step.

    arXiv:2601.05242 eqs. 4 to 6. The terms arrive with their weights in them, which would cancel:
    they are taken out first. A term that is equal within its group, or missing, adds 0. Rewards
    (0, 0) and (1, 2) of G = 2: -1.4142 and 1.4142 before the step's norm.
    """
    sums = [
        decoupled_values(item.components, weights=weights, ddof=ddof, eps=eps) for item in groups
    ]
    if batch_norm == "tokens":
        per_token = [every_token(i.group, values) for i, values in zip(groups, sums, strict=True)]
        return whitened_over_tokens(groups, per_token)
    total = standardized_values(np.concatenate(sums), ddof=ddof, eps=eps)
    parts = np.split(total, np.cumsum([len(values) for values in sums])[:-1])
    return [every_token(item.group, part) for item, part in zip(groups, parts, strict=True)]


def decoupled_values(
    components: Float64, *, weights: Sequence[float], ddof: int, eps: float
) -> Float64:
    """The weighted sum of the standardised terms; NaN where no term applies. [G]"""
    total = np.zeros(len(components))
    for column, weight in zip(components.T, weights, strict=True):
        total += weight * standardized_values(column / weight, ddof=ddof, eps=eps)
    return np.where(np.isnan(components).all(axis=1), np.nan, total)


def _discounted_sums(values: Float64, gamma: float) -> Float64:
    """Of each token and those after it, discounted: 1, 2, 4 and gamma 0.5 give 3, 4, 4. [T]"""
    sums = np.zeros(len(values) + 1)
    for place in range(len(values) - 1, -1, -1):
        sums[place] = values[place] + gamma * sums[place + 1]
    return sums[:-1]


def _mean(rewards: Float64) -> float:
    return float(np.nanmean(rewards)) if not np.isnan(rewards).all() else np.nan


def _centred_or_nan(rewards: Float64) -> Float64:
    return np.where(np.isnan(rewards), np.nan, centred_values(rewards))


def whitened_over_tokens(
    groups: Sequence[RewardedGroup], returns: list[PerToken]
) -> list[PerToken]:
    """Tokens that the policy wrote, over their own mean and sample deviation in the step."""
    by_policy = [
        [(rollout.origins == Origin.POLICY) & ~np.isnan(row) for rollout, row in pairs]
        for item, rows in zip(groups, returns, strict=True)
        for pairs in [list(zip(item.group.rollouts, rows, strict=True))]
    ]
    counted = np.concatenate(
        [
            row[mask]
            for rows, masks in zip(returns, by_policy, strict=True)
            for row, mask in zip(rows, masks, strict=True)
        ]
    )
    if len(counted) < 2 or np.ptp(counted) <= CONSTANT_RANGE:
        return [[np.zeros(len(row)) for row in rows] for rows in returns]
    mean, scale = counted.mean(), 1 / np.sqrt(counted.var(ddof=1) + WHITENING_EPS)
    return [
        [np.where(mask, (row - mean) * scale, 0.0) for row, mask in zip(rows, masks, strict=True)]
        for rows, masks in zip(returns, by_policy, strict=True)
    ]
