"""RLOO, REINFORCE leave-one-out (arXiv:2402.14740): the baseline is the mean of the others.

TRL's form: an answer is one action, its ratio is that of the whole answer and is clipped as such.
With `ratio: token` each token is an action, as in verl. The KL term is a penalty in the loss, or
with `kl_in_reward: 0.05` and `beta: 0` part of the reward, as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, ratios
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline

LOG_RATIOS = {"sequence": ratios.sequence_sum_log_ratio, "token": ratios.token_log_ratio}
MEANS = {"sequence": aggregation.sequence_mean, "token": aggregation.token_mean}


class Config(ClippedConfig):
    """Settings of RLOO; `num_generations` and `beta` are TRL's."""

    num_generations: int = Field(2, ge=2, description="G, rollouts per prompt")
    beta: float = Field(0.05, ge=0, description="coefficient of the KL penalty to the reference")
    ratio: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: the ratio of the whole answer and a mean over answers; token: the "
        "ratio of each token and a mean over tokens",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards minus the mean of the other answers' rewards."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=advantage.leave_one_out,
        aggregation=MEANS[config.ratio],
    )


def objective(config: Config) -> Objective:
    """PPO-clip on the ratio of the answer, not divided by its length, or of the token."""
    return clipped_objective(config, log_ratio=LOG_RATIOS[config.ratio])
