"""RAFT++ (arXiv:2504.11343): RAFT with the ratio and the clip of PPO.

Answers of positive reward are made more likely, until the ratio leaves the clip range.
"""

from __future__ import annotations

from grpo.algorithms import raft
from grpo.algorithms.options import ClippedConfig, clipped_objective
from grpo.objective import Objective

pipeline = raft.pipeline  # the same answers with the same weights


class Config(raft.AcceptedConfig, ClippedConfig):
    """Settings of RAFT++."""


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
