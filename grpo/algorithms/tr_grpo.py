"""TR-GRPO (arXiv:2511.00066): rare tokens dominate the gradient, so likelier ones weigh more.

The weight is a clipped sigmoid of the token's probability. `weight: linear` is the advantage
reweighting of arXiv:2505.12929; its other form is the sigmoid with mu 0, scale 5, centre 0.4, low
0 and high 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, gates, penalties, ratios
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Gate, Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of TR-GRPO. The sigmoid's argument was not found: 9 p fits the paper's intent."""

    weight: Literal["sigmoid", "linear"] = Field(
        "sigmoid", description="how a token's weight grows with its probability"
    )
    placement: Literal["outside", "inside"] = Field(
        "outside",
        description="outside: the weight multiplies the clipped term; inside (the paper): it "
        "multiplies the ratio, so a weight above 1 + epsilon_high leaves good answers no gradient",
    )
    alpha: float = Field(2.0, gt=0, description="sigmoid: factor")
    mu: float = Field(0.25, ge=0, description="sigmoid: what is taken off before the factor")
    scale: float = Field(9.0, gt=0, description="sigmoid: slope in the probability")
    centre: float = Field(0.0, ge=0, le=1, description="sigmoid: probability at its middle")
    low: float = Field(1.0, ge=0, description="sigmoid: lower bound of the weight")
    high: float = Field(1.4, gt=0, description="sigmoid: upper bound of the weight")
    share: float = Field(
        0.3, ge=0, lt=1, description="linear: the weight is 1 - share + share * probability"
    )
    weighted_kl: bool = Field(
        False,
        description="weigh the reference in the KL penalty, too, as a third party reads the "
        "paper; it is then not 0 where policy and reference agree",
    )

    @model_validator(mode="after")
    def _weights_can_be_meant(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, but it must not exceed high = {self.high:g}")
        if self.weighted_kl and self.kl_estimator != "k3":
            raise ValueError(
                f"weighted_kl is defined for kl_estimator k3, found {self.kl_estimator}: set "
                "kl_estimator: k3, or weighted_kl: false"
            )
        if self.low == 0 and (self.placement == "inside" or self.weighted_kl):
            raise ValueError(
                "low is 0, but a weight inside the ratio or the KL penalty must be above 0: set "
                "placement: outside and weighted_kl: false, or raise low"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages; every token of an update weighs the same before its weight."""
    return answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        aggregation=aggregation.token_mean,
    )


def objective(config: Config) -> Objective:
    """PPO-clip with the weight inside the ratio or on the clipped term."""
    weight = _weight(config)
    plain = clipped_objective(config)
    if config.weighted_kl:
        kl = partial(penalties.weighted_k3, weight=weight)
        terms = [replace(p, fn=kl) if p.fn is penalties.k3 else p for p in plain.penalties]
        plain = replace(plain, penalties=tuple(terms))
    if config.placement == "inside":
        return replace(plain, log_ratio=partial(ratios.weighted_log_ratio, weight=weight))
    return replace(plain, gates=(*plain.gates, weight))


def _weight(config: Config) -> Gate:
    if config.weight == "linear":
        return partial(gates.linear_probability_weight, share=config.share)
    return partial(
        gates.probability_weight,
        alpha=config.alpha,
        mu=config.mu,
        scale=config.scale,
        centre=config.centre,
        low=config.low,
        high=config.high,
    )
