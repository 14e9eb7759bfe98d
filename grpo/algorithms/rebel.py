"""REBEL (arXiv:2404.16767): regress differences of rewards on differences of log-ratios.

The squared error over the pairs of a prompt's answers, here of a whole group at once. No ratio is
clipped and no answer's length divides: log-ratios are sums over answers. The KL term stands in the
reward. The released code takes two answers and goes four times over each step's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, sequence_scores, surrogates, token_weights
from grpo.algorithms.options import (
    GroupConfig,
    answer_pipeline,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline
from grpo.sequence_scores import Pairs


class Config(GroupConfig):
    """Settings of REBEL. `eta` must fit the scale of rewards: 1 online, 1e6 in another recipe.

    The regression holds whoever sampled: `importance_cap: null`, as in the paper, is right, too.
    """

    num_generations: int = Field(2, ge=2, description="G, rollouts per prompt")
    eta: float = Field(
        1.0, gt=0, description="log-ratio that a reward of 1 is worth (the paper's, as released)"
    )
    pairs: Pairs = Field(
        "distinct",
        description="mean over distinct pairs of a group, the paper's for two answers; all: over "
        "all ordered pairs, each answer with itself included",
    )
    kl_in_reward: float = Field(
        0.05,
        ge=0,
        description="coefficient of k1, log policy - log reference, taken off the reward; above 0 "
        "it needs the reference model",
    )

    @model_validator(mode="after")
    def _rewards_are_no_advantages(self) -> Self:
        if self.negative_scale != 1:
            raise ValueError(
                f"negative_scale is {self.negative_scale:g}, but what REBEL sends to the learner "
                "are rewards, not advantages: leave it at 1"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Rewards less their group's mean, which changes no difference; every answer weighs 1/B."""
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=advantage.centred,
        # Not a mean over tokens: an answer's log-ratio is a sum.
        aggregation=partial(aggregation.fixed_length, max_tokens=1),
    )
    # An answer without a reward would count as one of the mean reward.
    trained = (*plain.trained, token_weights.judged_only)
    return replace(plain, trained=trained)


def objective(config: Config) -> Objective:
    """The log-likelihood, weighed as the regression's gradient says."""
    return replace(
        plain_objective(config, surrogate=surrogates.log_likelihood),
        group_term=partial(sequence_scores.regressed, eta=config.eta, pairs=config.pairs),
    )
