"""Reinforce-Rej (arXiv:2504.11343): no baseline; prompts without both right and wrong are rejected.

An answer's advantage is 1 or -1, and 0 in a group whose answers are all right or all wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    mixed_groups_only,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of Reinforce-Rej. The paper's scripts add `beta` and `entropy_coef` 0.001."""

    num_generations: int = Field(4, ge=2, description="G, rollouts per prompt")
    right_above: float = Field(0.0, description="an answer is right if its reward is above this")
    dynamic_sampling: bool = Field(
        False,
        description="sample other prompts in place of rejected ones; false: they stay in the mean",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """1 for right, -1 for wrong answers of mixed groups; every token weighs the same."""
    return answer_pipeline(
        config,
        select=(mixed_groups_only(outcomes),) if config.dynamic_sampling else (),
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.right_or_wrong, threshold=config.right_above),
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
