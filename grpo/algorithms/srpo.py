"""SRPO, two-staged history-resampling policy optimisation (arXiv:2504.14286).

Prompts whose answers were all right the last time are left out; cut-off answers have no advantage;
one domain may come first. No code was found: all settings are as surveys and notes give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, history
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Skip


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of SRPO."""

    num_generations: int = Field(32, ge=2, description="G, rollouts per prompt")
    skip_solved: bool = Field(
        True, description="leave out prompts whose answers were all right the last time"
    )
    truncated_advantage: bool = Field(
        False,
        description="false: a cut-off answer counts in its group's statistics and has the "
        "advantage 0; true: it is trained like any other",
    )
    first_domains: tuple[str, ...] = Field(
        (), description="domains that alone are trained on at first (paper: mathematics)"
    )
    first_steps: int = Field(0, ge=0, description="steps that belong to first_domains")
    outcome_scorer: str | None = Field(
        None, description="the scorer that says what is right; null: that of the largest weight"
    )

    @property
    def domains(self) -> tuple[str, ...]:
        """Those of the first stage."""
        return self.first_domains

    @model_validator(mode="after")
    def _stages_are_whole(self) -> Self:
        if bool(self.first_domains) != bool(self.first_steps):
            raise ValueError(
                f"first_domains is {list(self.first_domains)} and first_steps is "
                f"{self.first_steps}: a first stage needs both; set both or neither"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with a token mean on prompts that are not solved yet."""
    scorer = task_scorer(outcomes, named=config.outcome_scorer, setting="outcome_scorer")
    standardized = partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps)
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=standardized,
        aggregation=aggregation.token_mean,
    )
    if not config.truncated_advantage:
        finished = partial(history.nothing_if_truncated, advantage=standardized)
        plain = replace(plain, advantage=finished)
    skip = _skip(config)
    if not skip:
        return plain
    return replace(
        plain,
        skip=skip,
        adapt=partial(history.remember_solved, scorer=scorer),
        metrics=(history.history_metrics,),
        initial_state=history.PromptHistory(),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _skip(config: Config) -> tuple[Skip, ...]:
    chosen: tuple[Skip, ...] = ()
    if config.first_steps:
        first, steps = config.first_domains, config.first_steps
        chosen += (partial(history.other_domain_first, domains=first, num_steps=steps),)
    if config.skip_solved:
        chosen += (history.solved_last_time,)
    return chosen
