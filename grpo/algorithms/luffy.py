"""LUFFY, learning to reason under off-policy guidance (arXiv:2504.14945).

One answer of each group is a known solution, compared with the policy's own. Its tokens are trained
with p / (p + gamma), p their probability, so that what the policy finds unlikely is learnt, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, demonstrations, surrogates
from grpo.algorithms.options import (
    ClippedConfig,
    LengthRewardConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.algorithms.task_scorer import task_scorer
from grpo.objective import Objective
from grpo.pipeline import Pipeline

STATISTICS = {"all": advantage.centred, "own": demonstrations.centred_on_own}


class Config(ClippedConfig, LengthRewardConfig):
    """Settings of LUFFY; defaults are those of the released script."""

    num_demonstrations: int = Field(
        1, ge=0, description="of the num_generations answers so many are the prompt's solution"
    )
    end_token: int | None = Field(
        None,
        ge=0,
        description="id of the token that ends an answer, appended to the solution; null: the "
        "policy goes on after the solution, and has to end it",
    )
    statistics: Literal["all", "own"] = Field(
        "all",
        description="the mean that is taken off rewards: over all answers of the group, or over "
        "the policy's own (released as grpo_split)",
    )
    gamma: float = Field(0.1, gt=0, description="of the shaping p / (p + gamma)")
    clip: bool = Field(
        False, description="clip the ratio of the policy's own answers by epsilon; released: no"
    )
    entropy_coef: float = Field(0.001, ge=0, description="bonus for the entropy of the policy")

    @model_validator(mode="after")
    def _some_answers_are_own(self) -> Self:
        if self.num_demonstrations >= self.num_generations:
            raise ValueError(
                f"num_demonstrations is {self.num_demonstrations} of num_generations "
                f"{self.num_generations}: no answer would be the policy's own; lower the one"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Dr. GRPO with a demonstration in each group, its tokens trained."""
    scorer = task_scorer(outcomes, named=None, setting="scorers")
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=advantage.centred,
        aggregation=partial(aggregation.fixed_length, max_tokens=max_completion_length),
    )
    if config.num_demonstrations == 0:
        return plain
    return replace(
        plain,
        plan=partial(
            demonstrations.demonstrated,
            num_generations=config.num_generations,
            num_demonstrations=config.num_demonstrations,
            end_token=config.end_token,
            max_tokens=max_completion_length,
        ),
        advantage=STATISTICS[config.statistics],
        trained=(),
        metrics=(partial(demonstrations.demonstration_metrics, scorer=scorer),),
    )


def objective(config: Config) -> Objective:
    """The plain ratio on what the policy wrote, the shaped probability on what it was given."""
    clipped = clipped_objective(config)
    own = clipped.surrogate if config.clip else surrogates.unclipped
    if config.num_demonstrations == 0:
        return replace(clipped, surrogate=own)
    shaped = partial(surrogates.shaped_probability, gamma=config.gamma)
    return replace(clipped, surrogate=partial(surrogates.by_origin, policy=own, guidance=shaped))
