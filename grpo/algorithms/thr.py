"""THR, token hidden reward (arXiv:2510.03669): steer between exploitation and exploration by token.

A token's hidden reward says how much training on it raises the group's right answers. Only tokens
with much of it are trained, and those that raise right answers weigh more (exploitation) or less
(exploration). Reconstructed: the exact rule, its strength, and whether the steered form keeps the
mask were not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, hidden_rewards
from grpo.algorithms.nthr import with_hidden_rewards
from grpo.algorithms.options import (
    RightAnswerConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, RightAnswerConfig):
    """Settings of THR. `steer` 0 with `mask` trains on dominant tokens alone; neither is GRPO."""

    steer: float = Field(
        0.2,
        ge=-1,
        le=1,
        description="tokens of positive hidden reward weigh 1 + steer, the others 1 - steer: above "
        "0 exploits (better greedy answers), below 0 explores (better pass@k) (paper: p)",
    )
    mask: bool = Field(True, description="do not train on tokens of small hidden reward")
    threshold: float = Field(
        1.0,
        description="small: not above this times the smallest mean score of a right answer, as in "
        "NTHR",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with every token weighed by its hidden reward."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    if _is_neutral(config):
        return plain
    judges, above = judging(outcomes), config.right_above
    weight = partial(
        hidden_rewards.steered,
        weights=judges,
        right_above=above,
        threshold=config.threshold,
        steer=config.steer,
        mask=config.mask,
    )
    return with_hidden_rewards(plain, weight, weights=judges, right_above=above)


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    measures = () if _is_neutral(config) else (hidden_rewards.MEASURE,)
    return replace(clipped_objective(config), measures=measures)


def _is_neutral(config: Config) -> bool:
    return config.steer == 0 and not config.mask
