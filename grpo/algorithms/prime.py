"""PRIME, process rewards that nobody labelled (arXiv:2502.01456).

A reward model that only learns which answers are right gives each token log(its probability /
that of its starting point). Those rewards and the outcome are each compared with the other answers
of the group, summed to the right, added and whitened. The reward model is one of the recipe's
scorers and learns after each step; here only its scores matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import aggregation, process_advantage, process_spans, selection, step_advantage
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer, without_step_scorer
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Select
from grpo.process_spans import ProcessUnit


class Config(ClippedConfig):
    """Settings of PRIME, the released script's. Its learning rate is 5e-7, the model's 1e-6."""

    num_generations: int = Field(4, ge=2, description="G, rollouts per prompt")
    process_scorer: str | None = Field(
        None,
        description="the scorer that gives tokens (or steps) their rewards; it is no part of the "
        "outcome, whatever its weight; null: outcomes alone, which is REINFORCE++ with baseline",
    )
    process_coef: float = Field(1.0, ge=0, description="of the process rewards; the outcome has 1")
    process_unit: ProcessUnit = Field(
        "tokens",
        description="what is judged by itself: each token, or each step (far fewer scores), whose "
        "reward then counts at its end",
    )
    min_step_chars: int = Field(
        20, ge=1, description="with process_unit steps: a shorter one joins its neighbour"
    )
    normalize_process: bool = Field(
        True, description="divide process rewards by the largest return of the step"
    )
    outcome_scorer: str | None = Field(
        None,
        description="the scorer whose mean over a group is its accuracy; null: that of the "
        "largest weight",
    )
    accuracy_low: float = Field(
        0.2, ge=0, le=1, description="groups below this accuracy are dropped"
    )
    accuracy_high: float = Field(
        0.8, ge=0, le=1, description="groups above this accuracy are dropped"
    )

    @model_validator(mode="after")
    def _something_is_kept(self) -> Self:
        if self.accuracy_low > self.accuracy_high:
            raise ValueError(
                f"accuracy_low is {self.accuracy_low:g}, above accuracy_high = "
                f"{self.accuracy_high:g}, so every group would be dropped; swap them"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Two sources of reward, leave-one-out each, whitened over the step's tokens."""
    scorer = config.process_scorer
    answers = without_step_scorer(outcomes, named=scorer, setting="process_scorer")
    plain = answer_pipeline(
        config,
        select=_select(config, answers),
        rewards=reward_terms(config, answers),
        advantage=partial(step_advantage.whitened, baseline="group", gamma=1.0),
        aggregation=aggregation.token_mean,
    )
    if scorer is None:
        return plain
    return replace(
        plain,
        spans=partial(
            process_spans.answers_and_process,
            process_scorer=scorer,
            unit=config.process_unit,
            min_chars=config.min_step_chars,
        ),
        advantage=partial(
            process_advantage.two_sources,
            scorer=scorer,
            process_coef=config.process_coef,
            normalize=config.normalize_process,
        ),
        metrics=(partial(process_advantage.process_metrics, scorer=scorer),),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _select(config: Config, answers: Mapping[str, float]) -> tuple[Select, ...]:
    low, high = config.accuracy_low, config.accuracy_high
    if (low, high) == (0.0, 1.0):
        return ()
    task = task_scorer(judging(answers), named=config.outcome_scorer, setting="outcome_scorer")
    return (partial(selection.drop_unless_accuracy_within, scorer=task, low=low, high=high),)
