"""GSPO, group sequence policy optimisation (arXiv:2507.18071): one ratio per answer.

The ratio is that of the whole answer, to the power 1/length, and it is clipped as a whole. The
mean is over answers, as each token repeats its answer's ratio: there is no token-mean form.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, ratios
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
    """Settings of GSPO; its clip range is narrow because the ratio of an answer moves little."""

    epsilon: float = Field(3e-4, gt=0, lt=1, description="the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = Field(
        4e-4, gt=0, description="the ratio is clipped above 1 + epsilon_high; null: epsilon"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """As GRPO."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip on the ratio of the answer."""
    return clipped_objective(config, log_ratio=ratios.sequence_mean_log_ratio)
