"""NTHR, negative token hidden reward (arXiv:2505.18830): spare what wrong answers share with right.

Punishing a wrong answer also lowers right ones whose tokens mean the same. Tokens of wrong answers
whose gradient would raise the group's right answers weigh less. After the paper's text: no official
code was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, hidden_rewards
from grpo.algorithms.options import (
    RightAnswerConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.hidden_rewards import Eta
from grpo.objective import Objective
from grpo.pipeline import Measured, Pipeline, TokenWeight


class Config(StandardizedConfig, RightAnswerConfig):
    """Settings of NTHR; those of its runs, but for the batch."""

    beta: float = Field(1e-4, ge=0, description="coefficient of the KL penalty to the reference")
    std_ddof: Literal[0, 1] = Field(0, description="1: sample deviation, 0: population deviation")
    threshold: float = Field(
        1.0,
        description="a token counts as shared above this times the smallest mean score of a right "
        "answer (paper: beta; 0 for DeepSeek-R1-Distill-Qwen-1.5B)",
    )
    eta: Eta = Field(
        "imbalance",
        description="factor of such tokens: imbalance 2 |p - 1/2| with p the share of right "
        "answers (the paper's), p itself, 1 - p, zero (its diagnosis), or one (GRPO)",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO whose wrong answers are punished less where they resemble right ones."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    if config.eta == "one":
        return plain
    judges, above = judging(outcomes), config.right_above
    weight = partial(
        hidden_rewards.weakened_negatives,
        weights=judges,
        right_above=above,
        threshold=config.threshold,
        eta=config.eta,
    )
    return with_hidden_rewards(plain, weight, weights=judges, right_above=above)


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    measures = () if config.eta == "one" else (hidden_rewards.MEASURE,)
    return replace(clipped_objective(config), measures=measures)


def with_hidden_rewards(
    plain: Pipeline, weight: TokenWeight, *, weights: Mapping[str, float], right_above: float
) -> Pipeline:
    """A token weight that reads hidden rewards, and what it takes to have them."""
    labels = partial(hidden_rewards.right_labels, weights=weights, right_above=right_above)
    metrics = partial(
        hidden_rewards.hidden_reward_metrics, weights=weights, right_above=right_above
    )
    return replace(
        plain,
        token_weight=(*plain.token_weight, weight),
        measures=(*plain.measures, Measured(name=hidden_rewards.NAME, labels=labels)),
        metrics=(*plain.metrics, metrics),
    )
