"""Multi-label reward regression (arXiv:2503.21819): one reward model with several labels, and GRPO.

Each label (politeness, safety, ...) is one of the recipe's scorers; an answer's reward is their
weighted sum. Secondary: the paper's weights and G were not found. A vector of labels can also be
standardised label by label (`gdpo`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import advantage, aggregation, step_advantage
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    refuse_kl_among_decoupled,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Advantage, Pipeline


class Config(StandardizedConfig):
    """Settings of multi-label GRPO."""

    label_weights: dict[str, float] = Field(
        {},
        description="weight of each label's scorer, in place of the scorers' own; none: each "
        "scorer's own weight over their number, so that plain scorers make a mean",
    )
    combine: Literal["sum", "decoupled"] = Field(
        "sum",
        description="sum: the weighted sum is standardised; decoupled: each label is, before "
        "they are summed and standardised over the step, as in GDPO",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """The labels' weighted sum, standardised in its group; every answer weighs 1/B."""
    weights = label_weights(config, outcomes)
    terms = reward_terms(config, weights)
    return answer_pipeline(
        config,
        rewards=terms,
        advantage=_advantage(config, (*weights.values(), *[1.0] * (len(terms) - len(weights)))),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def label_weights(config: Config, outcomes: Mapping[str, float]) -> dict[str, float]:
    """The weight of each label, none of them 0."""
    if not config.label_weights:
        labels = judging(outcomes)
        return {name: weight / len(labels) for name, weight in labels.items()}
    unknown = sorted(config.label_weights.keys() - outcomes.keys())
    if unknown:
        raise ValueError(
            f"algorithm.label_weights names {', '.join(unknown)}, but the recipe's scorers are "
            f"{', '.join(outcomes)}: correct the names, or add the scorers"
        )
    return judging(config.label_weights)


def _advantage(config: Config, weights: tuple[float, ...]) -> Advantage:
    ddof, eps = config.std_ddof, config.std_eps
    if config.combine == "sum":
        return partial(advantage.standardized, ddof=ddof, eps=eps)
    refuse_kl_among_decoupled(config)
    return partial(
        step_advantage.decoupled, weights=weights, ddof=ddof, eps=eps, batch_norm="rollouts"
    )
