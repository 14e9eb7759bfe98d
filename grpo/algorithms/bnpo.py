"""BNPO, the `loss_type` bnpo of TRL (TRL loss_type bnpo): GRPO with a mean over a batch's tokens.

TRL's batch is what one process has in memory at once, so its result depends on the hardware. Here
the batch is chosen: the whole update, which is DAPO's token mean, or a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline

MEANS = {
    "update": aggregation.token_mean,
    "group": aggregation.group_token_mean,
    "answer": aggregation.sequence_mean,
}


class Config(StandardizedConfig):
    """Settings of BNPO."""

    local_batch: Literal["update", "group", "answer"] = Field(
        "update",
        description="whose tokens a mean is over: update: all of an optimiser update; group: of "
        "a prompt's answers, as in TRL with num_generations rows a process; answer: GRPO, as in "
        "TRL with one row a process",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages and another mean."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=MEANS[config.local_batch],
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
