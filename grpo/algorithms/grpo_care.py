"""GRPO-CARE (arXiv:2506.16141): a bonus for right answers that follow from their own reasoning.

A slowly moving copy of the policy says how likely the final answer is after the reasoning before
it; among the right answers of a group the likelier ones earn more. After the released code; the
span of the answer is found in the text instead of by counting tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, consistency
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer
from grpo.measures import REFERENCE
from grpo.objective import Objective, ReferenceUpdate
from grpo.pipeline import Measured, Pipeline


class Config(StandardizedConfig):
    """Settings of GRPO-CARE, from the released scripts; the KL penalty is off in them."""

    bonus_coef: float = Field(
        0.5, ge=0, description="bonus of a likely right answer, times its accuracy; 0: GRPO"
    )
    bonus_margin: float = Field(
        0.0,
        ge=0,
        description="an answer is likely if its likelihood is not more than this below the mean "
        "of the right ones; the scripts have none, or 0.01",
    )
    likelihood_cap: float = Field(
        0.95, gt=0, le=1, description="likelihoods above this count as this"
    )
    outcome_scorer: str | None = Field(
        None, description="scorer that gives the accuracy; null: that of the largest weight"
    )
    answer_opening: str = Field(
        "<answer>", min_length=1, description="text that the final answer follows; the last counts"
    )
    answer_closing: str | None = Field(
        "</answer>", min_length=1, description="text after the answer; null: the text's end"
    )
    reference_every: int = Field(10, ge=1, description="steps between updates of the reference")
    reference_decay: float = Field(
        0.995, ge=0, le=1, description="what stays of the reference in an update; 1: it is frozen"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with the bonus as one more reward term."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    if config.bonus_coef == 0:
        return plain
    opening, closing = config.answer_opening, config.answer_closing
    bonus = partial(
        consistency.consistency_bonus,
        scorer=task_scorer(outcomes, named=config.outcome_scorer, setting="outcome_scorer"),
        coefficient=config.bonus_coef,
        cap=config.likelihood_cap,
        margin=config.bonus_margin,
        opening=opening,
        closing=closing,
    )
    return replace(
        plain,
        rewards=(*plain.rewards, bonus),
        measures=(Measured(name=REFERENCE.name),),
        metrics=(partial(consistency.consistency_metrics, opening=opening, closing=closing),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip; the reference follows the policy slowly."""
    plain = clipped_objective(config)
    if config.bonus_coef == 0:
        return plain
    update = ReferenceUpdate(every=config.reference_every, decay=config.reference_decay)
    return replace(
        plain,
        measures=(REFERENCE,),
        reference_update=update if config.reference_decay < 1 else None,
    )
