"""The 80/20 rule (arXiv:2506.01939): train only on the tokens at which the policy is least sure.

DAPO on the fifth of the tokens that have the highest entropy. The released code selects within a
micro-batch; here it is within a group, so that packing changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import entropy_selection
from grpo.algorithms import dapo
from grpo.measures import ENTROPY
from grpo.objective import Objective
from grpo.pipeline import Measured, Pipeline


class Config(dapo.Config):
    """DAPO's settings, a dual clip of 10 as in the released script, and the share of tokens."""

    delta: float | None = Field(
        10.0,
        gt=1,
        description="upper bound of the ratio when the advantage is negative; null: none",
    )
    entropy_share: float = Field(
        0.2, gt=0, le=1, description="share of a group's tokens to train on; 1: DAPO (paper: rho)"
    )
    entropy_normalizer: Literal["kept", "all"] = Field(
        "kept",
        description="kept: the mean is over the tokens trained on, exactly this share of them, as "
        "released; all: the others stay in the mean with weight 0 and keep their penalties, and "
        "all that reach the quantile are trained on, as in TRL: a loss smaller by the share",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """DAPO on the tokens of highest entropy."""
    plain = dapo.pipeline(config, outcomes=outcomes, max_completion_length=max_completion_length)
    if config.entropy_share == 1:
        return plain
    plain = replace(plain, measures=(Measured(name=ENTROPY.name),))
    share, among = config.entropy_share, plain.trained
    if config.entropy_normalizer == "all":
        weight = partial(
            entropy_selection.high_entropy_weight, share=share, rule="quantile", among=among
        )
        return replace(plain, token_weight=(*plain.token_weight, weight))
    mask = partial(entropy_selection.high_entropy_tokens, share=share, rule="count", among=among)
    return replace(plain, trained=(*plain.trained, mask))


def objective(config: Config) -> Objective:
    """DAPO's."""
    measures = () if config.entropy_share == 1 else (ENTROPY,)
    return replace(dapo.objective(config), measures=measures)
