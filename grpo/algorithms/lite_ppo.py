"""Lite PPO (arXiv:2508.08221): the deviation is the whole step's, the mean is over tokens.

A group whose rewards hardly differ is not blown up to the size of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from grpo import aggregation, step_advantage
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of Lite PPO; the deviation and eps are TRL's with `scale_rewards: batch`."""


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards minus the group's mean over the step's deviation; every token weighs the same."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(
            step_advantage.step_standardized, ddof=config.std_ddof, eps=config.std_eps
        ),
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
