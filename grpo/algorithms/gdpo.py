"""GDPO, group reward-decoupled normalisation (arXiv:2601.05242), for several scorers.

Each reward is standardised in its group before they are summed by weight, so that different
combinations of rewards stay apart; the sum is standardised over the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import aggregation, rewards, step_advantage
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    length_terms,
    outcome_terms,
    refuse_kl_among_decoupled,
)
from grpo.config import Schema
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Reward


class Condition(Schema):
    """A reward that counts only where another one is high enough."""

    scorer: str = Field(description="whose score counts only under a condition")
    on: str = Field(description="the scorer that decides")
    at_least: float = Field(description="what `on` must give")


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of GDPO. A length reward is one more term, of weight 1 once standardised."""

    batch_norm: Literal["rollouts", "tokens"] = Field(
        "rollouts",
        description="rollouts: mean and deviation over the step's answers, as in the paper; "
        "tokens: over its tokens, as in verl, so that long answers weigh more",
    )
    conditions: tuple[Condition, ...] = Field(
        (), description="rewards that count only where another is high enough; else they are 0"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards standardised one by one, summed by weight, standardised over the step."""
    refuse_kl_among_decoupled(config)
    weights = judging(outcomes)
    terms = _conditioned(config, weights) + length_terms(config, outcomes)
    return answer_pipeline(
        config,
        rewards=terms,
        advantage=partial(
            step_advantage.decoupled,
            weights=(*weights.values(), *[1.0] * (len(terms) - len(weights))),
            ddof=config.std_ddof,
            eps=config.std_eps,
            batch_norm=config.batch_norm,
        ),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _conditioned(config: Config, weights: Mapping[str, float]) -> tuple[Reward, ...]:
    terms = dict(zip(weights, outcome_terms(weights), strict=True))
    for condition in config.conditions:
        for name in (condition.scorer, condition.on):
            if name not in terms:
                raise ValueError(
                    f"algorithm.conditions names the scorer {name!r}, but those with a weight are "
                    f"{', '.join(terms)}: correct the name, or give it a weight"
                )
        terms[condition.scorer] = partial(
            rewards.conditioned_outcome,
            scorer=condition.scorer,
            weight=weights[condition.scorer],
            on=condition.on,
            at_least=condition.at_least,
        )
    return tuple(terms.values())
