"""GRPO-lambda (arXiv:2510.00194), reconstructed: eligibility traces along an answer.

Tokens near the end of an answer, and in the "both" kernels its first ones, get more of the
advantage, or each token's ratio carries those before it. Negative advantages are bounded. Neither
the lambda-GRPO of arXiv:2510.06870 nor that of arXiv:2509.21154.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import advantage, aggregation, ratios, token_weights
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of GRPO-lambda. Kernels are approximate: the paper's exact form was not found."""

    decay: float = Field(
        0.99, ge=0, le=1, description="gamma * lambda: what is left of a trace one token on"
    )
    mode: Literal["weight", "trace"] = Field(
        "weight",
        description="weight: scales a token's policy term; trace: its log-ratio gathers those "
        "before it, so that early tokens get more",
    )
    kernel: Literal["recent", "both_max", "both_sum"] = Field(
        "both_max",
        description="weight mode: high at the end of an answer, or at both ends",
    )
    td: Literal["terminal", "constant"] = Field(
        "terminal",
        description="weight mode: the error that the trace carries back comes at the last token, "
        "or at every token",
    )
    advantage_floor: float | None = Field(
        -0.1, lt=0, description="no advantage is below this; null: no floor"
    )

    @model_validator(mode="after")
    def _kernel_fits_the_error(self) -> Self:
        if self.mode == "weight" and self.td == "constant" and self.kernel != "recent":
            raise ValueError(
                f"td is constant and kernel is {self.kernel}: only the kernel recent is defined "
                "for a constant error; set kernel: recent, or td: terminal"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with floored advantages, weighted along the answer."""
    chosen = partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps)
    if config.advantage_floor is not None:
        chosen = partial(advantage.floored, advantage=chosen, floor=config.advantage_floor)
    pipeline = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=chosen,
        aggregation=aggregation.sequence_mean,
    )
    if config.mode == "trace":
        return pipeline
    weight = partial(
        token_weights.trace_weights, decay=config.decay, kernel=config.kernel, td=config.td
    )
    return replace(pipeline, token_weight=(weight,))


def objective(config: Config) -> Objective:
    """PPO-clip on the token's ratio or on its trace."""
    if config.mode == "trace":
        trace = partial(ratios.traced_log_ratio, decay=config.decay)
        return clipped_objective(config, log_ratio=trace)
    return clipped_objective(config)
