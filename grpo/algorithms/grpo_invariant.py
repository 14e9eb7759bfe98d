"""Group-invariant GRPO (after arXiv:2310.11971): prompts that go badly weigh more than easy ones.

The paper learns which of two groups an answer belongs to and punishes the variance between their
returns. Here the groups are the better and the worse half of a step's prompts, and the gradient of
that punishment is a weight on the advantages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, step_advantage
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
    """Settings of group-invariant GRPO; the paper's coefficient was not found."""

    invariance_coef: float = Field(
        0.5, ge=0, description="coefficient of the variance between the halves; rewards within 0, 1"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages, scaled by how the half of the prompt fares."""
    plain = partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps)
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(
            step_advantage.invariant, advantage=plain, penalty=config.invariance_coef
        ),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
