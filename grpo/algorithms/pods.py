"""PODS, policy optimisation with down-sampling (arXiv:2504.13818): sample many, train on a few.

Of each group the rollouts whose rewards vary most are kept; mean and deviation are theirs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, difficulty, subsets
from grpo.algorithms.options import (
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig):
    """Settings of PODS; 64 and a quarter of it are those of the paper's 3B runs."""

    num_generations: int = Field(64, ge=2, description="rollouts sampled per prompt")
    num_kept: int | None = Field(
        None,
        ge=2,
        description="rollouts of a prompt that are trained on; null: a quarter of num_generations",
    )

    @property
    def keep(self) -> int:
        """num_kept, or num_generations / 4 where it is not set; at least 2."""
        return max(self.num_generations // 4, 2) if self.num_kept is None else self.num_kept

    @model_validator(mode="after")
    def _keeps_no_more_than_it_samples(self) -> Self:
        if self.num_kept is not None and self.num_kept > self.num_generations:
            raise ValueError(
                f"num_kept is {self.num_kept}, but only num_generations = {self.num_generations} "
                "rollouts are sampled: lower num_kept"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """As GRPO on the rollouts kept; rewards in the metrics are theirs, too."""
    keep = partial(
        subsets.keep_chosen,
        choose=subsets.most_varied,
        weights=judging(outcomes),
        keep=partial(difficulty.always, keep=config.keep),
    )
    return answer_pipeline(
        config,
        select=(keep,),
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
