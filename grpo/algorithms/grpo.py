"""GRPO, group relative policy optimisation (DeepSeekMath, arXiv:2402.03300).

The baseline of an answer is its own group: reward minus the group's mean, over the group's
standard deviation, on every token; PPO-clip; mean over tokens, then over answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from grpo import adaptation, advantage, aggregation, plans, spans, token_weights
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of GRPO, with the defaults of TRL where the paper says less.

    `beta` stays 0, which is TRL's default today; the paper's own runs used 0.04.
    """


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Sums the weighted outcomes, standardises them in their group; every answer weighs 1/B."""
    return Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=(),
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        trained=(token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=aggregation.sequence_mean,
        adapt=adaptation.unchanged,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
