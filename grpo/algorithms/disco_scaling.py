"""DISCO (arXiv:2505.15074): rewards scaled up in rare domains and on hard prompts.

Not the DisCO of arXiv:2505.12366. The group's mean is taken off and nothing is divided by the
deviation, which would cancel both scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, rewards
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    judging,
    length_terms,
    outcome_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of DISCO; rewards must not be negative. Its runs: G 4, `beta` 0.001."""

    num_generations: int = Field(4, ge=2, description="G, rollouts per prompt")
    beta: float = Field(0.001, ge=0, description="coefficient of the KL penalty to the reference")
    domain_shares: dict[str, float] = Field(
        {}, description="share of each domain in the data; a domain that is not named is average"
    )
    domain_weight: Literal["log", "squared_log", "inverse"] = Field(
        "log", description="of a domain of share p: log(1 + 1/p), its square, or 1/p"
    )

    @property
    def domains(self) -> tuple[str, ...]:
        """Those whose share is given."""
        return tuple(self.domain_shares)

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        wrong = {name: p for name, p in self.domain_shares.items() if not 0 < p <= 1}
        if wrong:
            raise ValueError(f"domain_shares has {wrong}; a share must lie above 0 and not above 1")
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Scaled rewards minus the group's mean; every answer weighs 1/B."""
    outcome_terms(outcomes)  # refuses a recipe without a scorer that counts
    scaled = partial(
        rewards.scaled_by_domain,
        weights=judging(outcomes),
        shares=config.domain_shares,
        form=config.domain_weight,
    )
    return answer_pipeline(
        config,
        rewards=(scaled, *length_terms(config, outcomes)),
        advantage=advantage.centred,
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
