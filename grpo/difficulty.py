"""How many rollouts of a prompt to learn from: always as many, or fewer where it goes well.

The algorithm's state is the mean rewards of the groups trained on last. Shapes: G rollouts in a
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.types import Float64, StepReport

MAX_MEANS = 1000  # enough for quartiles, and little to write into a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanRewards:
    """The mean rewards of groups, the newest last."""

    means: tuple[float, ...] = ()


def always(rewards: Float64, state: State, *, keep: int) -> int:
    """The same number for every group."""
    return keep


def by_difficulty(rewards: Float64, state: State, *, keep: int, warmup: int) -> int:
    """Fewer for easier prompts, by the quartile of the group's mean reward (arXiv:2508.09726).

    Below the median `keep`, below the upper quartile three quarters of it, above half of it, but 2
    at least; `keep` while fewer than `warmup` groups are known. Quartiles 0.35, 0.6, 0.825, keep 8:
    means 0.1, 0.45, 0.7, 0.95 keep 8, 8, 6, 4.
    """
    assert isinstance(state, MeanRewards)
    if len(state.means) < warmup or np.isnan(rewards).all():
        return keep
    middle, upper = np.quantile(state.means, (0.5, 0.75))
    mean = np.nanmean(rewards)
    share = 1.0 if mean < middle else 0.75 if mean < upper else 0.5
    return max(round(keep * share), 2)


def remember_means(
    state: State, groups: Sequence[RewardedGroup], report: StepReport
) -> MeanRewards:
    """Add the mean rewards of this step's groups and forget the oldest."""
    assert isinstance(state, MeanRewards)
    rewards = [item.rewards[~np.isnan(item.rewards)] for item in groups]
    means = [float(present.mean()) for present in rewards if len(present)]
    return MeanRewards(means=(*state.means, *means)[-MAX_MEANS:])
