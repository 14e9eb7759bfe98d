"""Dr. GRPO, "GRPO done right" (arXiv:2503.20783): GRPO without its two biases.

No division by the group's standard deviation (it favours prompts that are too easy or too hard)
and no division by the answer's length (it favours long wrong answers): the loss is summed over
tokens and divided by a constant, rows * max_completion_length.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from grpo import adaptation, advantage, aggregation, plans, spans, token_weights
from grpo.algorithms.options import (
    ClippedConfig,
    LengthRewardConfig,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig, LengthRewardConfig):
    """Settings of Dr. GRPO; the paper trains without a KL penalty, hence `beta` 0."""


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Sums the weighted outcomes, subtracts the group's mean; every token weighs the same."""
    return Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=(),
        rewards=reward_terms(config, outcomes),
        advantage=advantage.centred,
        trained=(token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=partial(aggregation.fixed_length, max_tokens=max_completion_length),
        adapt=adaptation.unchanged,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
