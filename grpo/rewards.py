"""From the scores of a group to its reward terms; each term is one column of the rewards.

NaN says that a term does not apply to a rollout; it never becomes a number on the way to the
advantage. Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from grpo.pipeline import State
from grpo.types import Bool, Float64, Group, Origin, Rollout

# Below this spread rewards are equal and what is left of them is round-off.
CONSTANT_RANGE = 1e-8
MIN_MEAN_REWARD = 1e-5  # of DISCO, as in its code


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


def total_outcome(group: Group, *, weights: Mapping[str, float]) -> Float64:
    """Weighted sum of the raw outcomes; NaN where no scorer of weight other than 0 applies. [G]"""
    columns = [w * outcome_values(group, scorer=name) for name, w in weights.items() if w != 0]
    stacked = np.stack(columns)
    return np.where(np.isnan(stacked).all(axis=0), np.nan, np.nansum(stacked, axis=0))


def conditioned_outcome(
    group: Group, state: State, *, scorer: str, weight: float, on: str, at_least: float
) -> Float64:
    """Weight times the score where another scorer gave at least so much, else 0. [G]

    GDPO, arXiv:2601.05242 eq. 8. Scores 1, 1, 0, 1 on 0.2, 1, 1, 0 at least 1: 0, 1, 0, 0.
    """
    is_met = outcome_values(group, scorer=on) >= at_least
    values = weighted_outcome(group, state, scorer=scorer, weight=weight)
    return np.where(np.isnan(values) | is_met, values, 0.0)


def scaled_by_domain(
    group: Group,
    state: State,
    *,
    weights: Mapping[str, float],
    shares: Mapping[str, float],
    form: Literal["log", "squared_log", "inverse"],
) -> Float64:
    """DISCO: reward * weight of the domain / (mean reward + 1e-5) (arXiv:2505.15074). [G]

    The domain's weight is log(1 + 1/p), its square, or 1/p, p its share of the data; an unnamed
    domain counts as average. A mean of 0 or less gives 0. Rewards 1, 0, 0, 1, p = 1/12, log:
    2.5649 / 0.50001 = 5.1298, 0, 0, 5.1298.
    """
    rewards = total_outcome(group, weights=weights)
    domain = group.prompt.domain
    share = shares[domain] if domain in shares else 1 / max(len(shares), 1)
    weight = {
        "log": np.log1p(1 / share),
        "squared_log": np.log1p(1 / share) ** 2,
        "inverse": 1 / share,
    }[form]
    if np.isnan(rewards).all():
        return rewards
    mean = float(np.nanmean(rewards))
    return rewards * (weight / (mean + MIN_MEAN_REWARD) if mean > 0 else 0.0)


def discount_of_the_likely(
    group: Group, state: State, *, weights: Mapping[str, float], coefficient: float, from_rank: int
) -> Float64:
    """Takes reward off answers that the policy found likely (arXiv:2506.02355). [G]

    -reward * coefficient * (rank + from_rank) / G, where rank 0 has the lowest mean
    log-probability and equal ones share their mean rank. from_rank 0 is the released code,
    1 the paper. Rewards 1, 0, 1, 1, log-probabilities -0.2, -0.5, -0.9, -0.4, coefficient 0.25,
    from_rank 0: -0.1875, 0, 0, -0.125.
    """
    means = np.array([_mean_log_prob(rollout) for rollout in group.rollouts], np.float64)
    below = (means[None, :] < means[:, None]).sum(axis=1)
    equal = (means[None, :] == means[:, None]).sum(axis=1)
    ranks = below + (equal - 1) / 2
    share: Float64 = (ranks + from_rank) / len(means)
    return -coefficient * share * total_outcome(group, weights=weights)


def soft_overlong(group: Group, state: State, *, max_tokens: int, cache_tokens: int) -> Float64:
    """DAPO's soft punishment of long answers (arXiv:2503.14476 eq. 13). [G]

    With n tokens, L max_tokens and c cache_tokens: 0 up to L - c, then (L - c - n) / c, -1 beyond
    L. L = 100, c = 20: 80 -> 0, 90 -> -0.5, 100 -> -1. NaN for a rollout that no scorer judged:
    a penalty of 0 alone would turn "not judged" into "wrong".
    """
    lengths = np.array([rollout.num_tokens for rollout in group.rollouts], np.float64)
    penalty = np.clip((max_tokens - cache_tokens - lengths) / cache_tokens, -1.0, 0.0)
    return np.where(is_judged(group), penalty, np.nan)


def kl_to_reference(group: Group, state: State, *, coefficient: float) -> Float64:
    """-coefficient * sum over an answer's own tokens of k1 = log sampled with - log reference. [G]

    The KL term in the reward instead of in the loss, as REBEL (arXiv:2404.16767) and TRL's RLOO
    have it; needs the measure "reference". Log-probabilities -1, -2 of a reference that gives
    -1.5, -2, coefficient 0.1: -0.05. NaN for a rollout that no scorer judged.
    """
    sums = [float(log_ratio_to_reference(rollout).sum()) for rollout in group.rollouts]
    return np.where(is_judged(group), -coefficient * np.array(sums, np.float64), np.nan)


def log_ratio_to_reference(rollout: Rollout) -> Float64:
    """Log-probability under the policy that sampled minus that of the reference; 0 on guidance. [T]

    Both at the temperature of the sampling.
    """
    gap = rollout.log_probs.astype(np.float64) - rollout.measured["reference"]
    return np.where(rollout.origins == Origin.POLICY, gap, 0.0)


def is_judged(group: Group) -> Bool:
    """Whether any scorer gave the rollout a value. [G]"""
    judged = {score.span.rollout for score in group.scores if score.value is not None}
    return np.array([place in judged for place in range(len(group.rollouts))], bool)


def _mean_log_prob(rollout: Rollout) -> float:
    own = rollout.log_probs[rollout.origins == Origin.POLICY]
    return float(own.mean(dtype=np.float64)) if len(own) else 0.0
