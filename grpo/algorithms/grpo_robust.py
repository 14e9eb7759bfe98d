"""Group-robust GRPO: domains on which the policy does badly weigh more (after arXiv:2405.20304).

The paper is on preference losses; here a domain's loss is 1 - mean reward, and a domain's weight
follows it from step to step. "Group" in its name is a domain of the data, not answers of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, domain_weights
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
    """Settings of group-robust GRPO; rewards are best within 0 and 1."""

    robust_step: float = Field(
        0.01, ge=0, description="how fast the weights of the domains follow their losses"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO whose policy term is scaled by the weight of the prompt's domain."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    return replace(
        plain,
        token_weight=(domain_weights.domain_weight,),
        adapt=partial(domain_weights.follow_losses, step_size=config.robust_step),
        metrics=(domain_weights.domain_metrics,),
        initial_state=domain_weights.DomainWeights(weights={}),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
