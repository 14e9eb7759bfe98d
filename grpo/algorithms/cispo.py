"""CISPO (MiniMax-M1, arXiv:2506.13585): the weight of a token is clipped, not its update.

Where PPO-clip takes the gradient from a token whose ratio left the range, CISPO keeps it and
bounds its weight. The bounds are of the ratio itself, not distances from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, surrogates
from grpo.algorithms.options import (
    DeviationConfig,
    LengthRewardConfig,
    answer_pipeline,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(DeviationConfig, LengthRewardConfig):
    """Settings of CISPO. The paper gives no number; 5 without a lower bound is ScaleRL's in TRL."""

    ratio_min: float | None = Field(
        None, ge=0, lt=1, description="lower bound of a token's weight; null: none"
    )
    ratio_max: float = Field(
        5.0,
        gt=1,
        description="upper bound of a token's weight: TRL's epsilon_high, verl's 1 + epsilon_high",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages; every token of an update weighs the same."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """REINFORCE with bounded importance weights."""
    weight = partial(surrogates.clipped_weight, low=config.ratio_min, high=config.ratio_max)
    return plain_objective(config, surrogate=weight)
