"""GSPO-token (arXiv:2507.18071 section 4.3): the ratio of the answer, the gradient of each token.

The loss and gradient are those of GSPO where an answer has one advantage; where advantages differ
between its tokens, each token follows its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpo import ratios
from grpo.algorithms import gspo
from grpo.algorithms.options import clipped_objective
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(gspo.Config):
    """Settings of GSPO-token; those of GSPO."""


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """As GSPO."""
    return gspo.pipeline(config, outcomes=outcomes, max_completion_length=max_completion_length)


def objective(config: Config) -> Objective:
    """PPO-clip on the ratio of the answer, with each token's own gradient."""
    return clipped_objective(config, log_ratio=ratios.sequence_token_log_ratio)
