"""Rewarding the unlikely (arXiv:2506.02355): right answers that the policy found likely earn less.

The discount grows with the rank of an answer's mean log-probability in its group. Groups whose
outcomes are all equal are dropped first, as the discount would set their answers apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, rewards
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    mixed_groups_only,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline

FIRST_RANK = {"code": 0, "paper": 1}


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of unlikeliness reward, from the released code."""

    num_generations: int = Field(32, ge=2, description="G, rollouts per prompt")
    beta: float = Field(0.1, ge=0, description="coefficient of the KL penalty to the reference")
    std_eps: float = Field(1e-6, ge=0, description="added to the group's standard deviation")
    rank_coef: float = Field(
        0.25, ge=0, le=1, description="share of its reward that the likeliest answer loses"
    )
    form: Literal["code", "paper"] = Field(
        "code",
        description="code: the rarest answer keeps its reward; paper: it loses rank_coef / G, as "
        "a note on the paper has it",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO on mixed groups, whose right answers lose reward by rank of likelihood."""
    discount = partial(
        rewards.discount_of_the_likely,
        weights=judging(outcomes),
        coefficient=config.rank_coef,
        from_rank=FIRST_RANK[config.form],
    )
    return answer_pipeline(
        config,
        select=(mixed_groups_only(outcomes),),
        rewards=(*reward_terms(config, outcomes), discount),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
