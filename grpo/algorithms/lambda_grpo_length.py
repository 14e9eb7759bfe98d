"""lambda-GRPO with learnable token preferences (arXiv:2510.06870): learn how length should count.

One exponent, trained by the same loss, weighs the long answers of a group against the short ones;
0 is the token mean of DAPO. Neither the lambda-GRPO of arXiv:2509.21154 (`lambda_grpo_prm`) nor the
GRPO-lambda of arXiv:2510.00194. Secondary: formula from reviews and a re-implementation, the
exponent's first value in the paper was not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, length_preference
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Learnable, Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig):
    """Settings of learnable length preference. The loss is minimised over the exponent, too."""

    initial_exponent: float = Field(
        0.0, description="the exponent before the first step (paper: lambda); above 0 favours long"
    )
    exponent_learning_rate: float = Field(
        0.1, ge=0, description="of its own SGD; 0: the exponent stays"
    )
    length_scale: float = Field(
        1 / 9,
        ge=0,
        lt=1,
        description="how much one standard deviation of length changes the base (paper: r)",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages; every token of an update weighs the same before its answer's weight."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip with a learnable weight of each answer."""
    plain = clipped_objective(config)
    is_fixed_at_one = config.initial_exponent == 0 and config.exponent_learning_rate == 0
    if is_fixed_at_one or config.length_scale == 0:
        return plain
    weights = partial(length_preference.preference_weights, scale=config.length_scale)
    learnable = Learnable(
        name="length_exponent",
        initial=config.initial_exponent,
        learning_rate=config.exponent_learning_rate,
        weights=weights,
    )
    return replace(plain, learnable=learnable)
