"""SPO-chain, segment policy optimisation (arXiv:2505.23564): credit for parts of an answer.

Answers are cut before unlikely tokens. Continuations from the cuts, which nobody is trained on, say
what a prefix is worth; the advantage of a part is what it added. For short answers. What the bare
prompt is worth is taken from the other answers, and the mean over tokens was not read: both ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import aggregation, chain_values, tree_plans
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of SPO-chain, those of its runs with a model of 1.5 billion parameters."""

    num_generations: int = Field(
        8, ge=2, description="answers per prompt; continuations come on top of them"
    )
    cut_below: float = Field(
        0.9,
        gt=0,
        le=1,
        description="cuts are made before tokens of lower probability; more likely ones are not "
        "trained",
    )
    cut_interval: int = Field(5, ge=1, description="cut before every so many such tokens")
    num_continuations: int = Field(
        4, ge=1, description="of each cut, to value its prefix; 9 in the paper's runs with Rho"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """What a segment adds to the expected reward; token mean over uncertain tokens."""
    below, interval = config.cut_below, config.cut_interval
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(chain_values.segment_advantages, probability=below, interval=interval),
        aggregation=aggregation.token_mean,
    )
    return replace(
        plain,
        plan=partial(
            tree_plans.value_continuations,
            num_chains=config.num_generations,
            num_continuations=config.num_continuations,
            probability=below,
            interval=interval,
        ),
        trained=(
            *plain.trained,
            chain_values.answers_only,
            partial(chain_values.uncertain_only, probability=below),
        ),
        metrics=(partial(chain_values.value_metrics, probability=below, interval=interval),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
