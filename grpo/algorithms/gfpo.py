"""GFPO, group filtered policy optimisation (arXiv:2508.09726): sample more, learn from the concise.

Of each group the shortest answers are kept, or those with the most reward per token. Mean and
deviation are theirs; the others get advantage 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

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

CHOICES = {
    "length": subsets.shortest,
    "token_efficiency": subsets.most_rewarded_per_token,
}


class Config(StandardizedConfig):
    """Settings of GFPO. The paper's runs add `beta` and `entropy_coef` 0.001; the lever is k/G.

    Adaptive: the paper's numbers are 8, 8, 6, 4 of 16; the length of its warm-up was not found.
    """

    num_generations: int = Field(16, ge=2, description="G, rollouts per prompt")
    num_kept: int | None = Field(
        None,
        ge=2,
        description="k, rollouts of a prompt to learn from; null: half of num_generations",
    )
    keep_by: Literal["length", "token_efficiency"] = Field(
        "length", description="length: the shortest answers; token_efficiency: reward per token"
    )
    normalizer: Literal["all", "kept"] = Field(
        "all",
        description="all: the mean counts the tokens of all G answers, as in the paper; kept: the "
        "others leave the group",
    )
    adaptive: bool = Field(
        False,
        description="keep fewer of easy prompts: all num_kept below the median of recent mean "
        "rewards, three quarters below the upper quartile, else half",
    )
    adaptive_warmup: int = Field(
        64, ge=1, description="groups to be trained on before adaptive begins"
    )
    std_ddof: Literal[0, 1] = Field(0, description="1: sample deviation, 0: population deviation")

    @property
    def keep(self) -> int:
        """num_kept, or num_generations / 2 where it is not set; at least 2."""
        return max(self.num_generations // 2, 2) if self.num_kept is None else self.num_kept

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        if self.num_kept is not None and self.num_kept > self.num_generations:
            raise ValueError(
                f"num_kept is {self.num_kept}, but only num_generations = {self.num_generations} "
                "rollouts are sampled: lower num_kept"
            )
        if self.adaptive and self.normalizer == "kept":
            raise ValueError(
                "adaptive is on and normalizer is kept: difficulty would be the mean reward of the "
                "rollouts kept, not of the prompt; set normalizer: all"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards standardised among the answers kept; every token weighs the same."""
    choose, keep = CHOICES[config.keep_by], _keep(config)
    ddof, eps = config.std_ddof, config.std_eps
    if config.normalizer == "all":
        plain = answer_pipeline(
            config,
            rewards=reward_terms(config, outcomes),
            advantage=partial(
                subsets.standardized_among_chosen, choose=choose, keep=keep, ddof=ddof, eps=eps
            ),
            aggregation=aggregation.token_mean,
        )
    else:
        judges = judging(outcomes)
        plain = answer_pipeline(
            config,
            select=(partial(subsets.keep_chosen, choose=choose, weights=judges, keep=keep),),
            rewards=reward_terms(config, outcomes),
            advantage=partial(advantage.standardized, ddof=ddof, eps=eps),
            aggregation=aggregation.token_mean,
        )
    if not config.adaptive:
        return plain
    return replace(plain, adapt=difficulty.remember_means, initial_state=difficulty.MeanRewards())


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)


def _keep(config: Config) -> subsets.Keep:
    if not config.adaptive:
        return partial(difficulty.always, keep=config.keep)
    return partial(difficulty.by_difficulty, keep=config.keep, warmup=config.adaptive_warmup)
