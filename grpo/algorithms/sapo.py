"""SAPO, soft adaptive policy optimisation (arXiv:2511.20347): a sigmoid instead of the clip.

A token's gradient fades smoothly as its ratio leaves 1, sooner where the advantage is negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import advantage, aggregation, surrogates
from grpo.algorithms.options import (
    DeviationConfig,
    LengthRewardConfig,
    answer_pipeline,
    plain_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(DeviationConfig, LengthRewardConfig):
    """Settings of SAPO, as in TRL."""

    tau_positive: float = Field(
        1.0, gt=0, description="how fast the gradient fades where the advantage is positive"
    )
    tau_negative: float = Field(
        1.05, gt=0, description="how fast the gradient fades where the advantage is negative"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """As GRPO."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.sequence_mean,
    )


def objective(config: Config) -> Objective:
    """The soft gate on token ratios."""
    gate = partial(
        surrogates.soft_gated, tau_positive=config.tau_positive, tau_negative=config.tau_negative
    )
    return plain_objective(config, surrogate=gate)
