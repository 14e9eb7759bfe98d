"""Process-supervision GRPO (DeepSeekMath, arXiv:2402.03300 section 4.1.3).

A scorer judges each step of each answer. All step scores of the group are standardised together,
and a token's advantage is the sum of those of the steps that end at it or later. Whether the
paper's deviation is a sample's is not said; its G and learning rate are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, process_advantage, process_spans
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.algorithms.task_scorer import without_step_scorer
from grpo.objective import Objective, ReferenceUpdate
from grpo.pipeline import Pipeline


class Config(StandardizedConfig):
    """Settings of process-supervision GRPO; G and `beta` are the paper's."""

    num_generations: int = Field(64, ge=2, description="G, rollouts per prompt")
    beta: float = Field(0.04, ge=0, description="coefficient of the KL penalty to the reference")
    step_scorer: str | None = Field(
        None,
        description="the scorer that judges steps; it is no part of the outcome, whatever its "
        "weight; null: outcomes alone, which is GRPO",
    )
    outcome_coef: float = Field(
        0.0,
        ge=0,
        description="with a step_scorer: of the standardised outcome that is added to the steps' "
        "advantages; the paper has none",
    )
    min_step_chars: int = Field(
        20, ge=1, description="a shorter step joins its neighbour; see grpo/steps.py"
    )
    reference_every: int | None = Field(
        None,
        ge=1,
        description="the paper's iterations: after so many steps the policy becomes the "
        "reference; null: it stays the initial policy",
    )

    @model_validator(mode="after")
    def _a_reference_is_read(self) -> Self:
        if self.reference_every is not None and self.beta == 0:
            raise ValueError(
                f"reference_every is {self.reference_every}, but beta is 0, so nothing reads the "
                "reference: set beta (the paper has 0.04), or leave reference_every null"
            )
        return self

    @model_validator(mode="after")
    def _rewards_for_length_count(self) -> Self:
        is_process_alone = self.step_scorer is not None and self.outcome_coef == 0
        if self.length_reward != "none" and is_process_alone:
            raise ValueError(
                f"length_reward is {self.length_reward}, but with a step_scorer and outcome_coef 0 "
                "only steps are trained on: set outcome_coef above 0, or length_reward: none"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO on the scores of steps; outcomes count by `outcome_coef`."""
    scorer = config.step_scorer
    answers = without_step_scorer(outcomes, named=scorer, setting="step_scorer")
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, answers),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )
    if scorer is None:
        return plain
    return replace(
        plain,
        spans=partial(
            process_spans.answers_and_process,
            process_scorer=scorer,
            unit="steps",
            min_chars=config.min_step_chars,
        ),
        advantage=partial(
            process_advantage.process_standardized,
            scorer=scorer,
            outcome_coef=config.outcome_coef,
            ddof=config.std_ddof,
            eps=config.std_eps,
        ),
        metrics=(partial(process_advantage.process_metrics, scorer=scorer),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    plain = clipped_objective(config)
    if config.reference_every is None:
        return plain
    return replace(plain, reference_update=ReferenceUpdate(every=config.reference_every, decay=0.0))
