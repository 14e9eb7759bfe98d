"""REINFORCE++-baseline (arXiv:2501.03262): the group's mean is taken off, the rest is whitened.

Unlike GRPO it divides by one deviation for the whole step, over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import aggregation, step_advantage
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    kl_measured,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of REINFORCE++-baseline, with a clip range of 0.2."""

    gamma: float = Field(
        1.0, gt=0, le=1, description="what is left of the reward one token before the last one"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Centred returns, whitened over all tokens of the step; every token weighs the same."""
    pipeline = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(
            step_advantage.whitened,
            baseline="group",
            gamma=config.gamma,
            kl_coef=config.kl_in_reward or None,
        ),
        aggregation=aggregation.token_mean,
    )
    return replace(pipeline, measures=kl_measured(config))


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
