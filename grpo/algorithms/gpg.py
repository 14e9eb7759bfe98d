"""GPG, group policy gradient (arXiv:2504.02546): REINFORCE with the group's mean as baseline.

No ratio, no clip, no deviation. The step is scaled up for the groups that teach nothing. verl's
`gpg` scales by prompts over right answers instead, which is not the paper's. Without a ratio only
the first update of a step is unbiased: keep `updates_per_step` 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from grpo import aggregation, step_advantage, surrogates
from grpo.algorithms.options import (
    GroupConfig,
    LengthRewardConfig,
    answer_pipeline,
    mixed_groups_only,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(GroupConfig, LengthRewardConfig):
    """Settings of GPG; a step is filled with useful groups or, as here, scaled up."""

    dynamic_sampling: bool = Field(
        False, description="drop groups whose outcomes are all equal and sample others instead"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Centred rewards, scaled to the share of groups that teach; every answer weighs 1/B."""
    return answer_pipeline(
        config,
        select=(mixed_groups_only(outcomes),) if config.dynamic_sampling else (),
        rewards=reward_terms(config, outcomes),
        advantage=step_advantage.rescaled,
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """The log-likelihood, weighted by the advantage."""
    return plain_objective(config, surrogate=surrogates.log_likelihood)
