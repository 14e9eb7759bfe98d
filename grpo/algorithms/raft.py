"""RAFT, reward-ranked fine-tuning (arXiv:2304.06767), as in arXiv:2504.11343: imitate good answers.

The loss is the log-likelihood of answers of positive reward. Without a ratio only the first update
of a step is unbiased: keep `updates_per_step` 1, or use raft_pp.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, subsets, surrogates
from grpo.algorithms.options import (
    GroupConfig,
    answer_pipeline,
    judging,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class AcceptedConfig(GroupConfig):
    """What RAFT and RAFT++ share. The scripts add `beta` 0.001 and `entropy_coef` 0.001."""

    num_generations: int = Field(4, ge=2, description="G, rollouts per prompt")
    normalizer: Literal["all", "kept"] = Field(
        "all",
        description="all: the mean counts the tokens of rejected answers, as in the released "
        "code; kept: rejected answers leave the group",
    )


class Config(AcceptedConfig):
    """Settings of RAFT."""


def pipeline(
    config: AcceptedConfig, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards above 0 on the answers that earned them; every token weighs the same."""
    keep = partial(subsets.keep_positive, weights=judging(outcomes))
    return answer_pipeline(
        config,
        select=(keep,) if config.normalizer == "kept" else (),
        rewards=reward_terms(config, outcomes),
        advantage=advantage.accepted,
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """The log-likelihood, weighted by the advantage."""
    return plain_objective(config, surrogate=surrogates.log_likelihood)
