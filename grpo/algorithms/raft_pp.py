"""RAFT++ (arXiv:2504.11343): RAFT with the ratio and the clip of PPO.

Answers of positive reward are made more likely, until the ratio leaves the clip range.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, subsets
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    outcome_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of RAFT++. The paper's scripts add `beta` 0.001 and `entropy_coef` 0.001."""

    num_generations: int = Field(4, ge=2, description="G, rollouts per prompt")
    normalizer: Literal["all", "kept"] = Field(
        "all",
        description="all: the mean counts the tokens of rejected answers, as in the released "
        "code; kept: rejected answers leave the group",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards above 0 on the answers that earned them; every token weighs the same."""
    keep = partial(subsets.keep_positive, weights=judging(outcomes))
    return answer_pipeline(
        config,
        select=(keep,) if config.normalizer == "kept" else (),
        rewards=outcome_terms(outcomes),
        advantage=advantage.accepted,
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
