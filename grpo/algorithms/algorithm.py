"""What makes an algorithm: settings, two halves, and how far its source can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from grpo.config import AlgorithmConfig
from grpo.objective import Objective
from grpo.pipeline import Pipeline

# Where it differs from GRPO first of all.
Kind = Literal[
    "advantage", "loss", "weights", "reward", "selection", "sampling", "tree", "process", "stage"
]
# What its formulas were read in: the authors' or a library's code, the paper, only what others
# say of the paper, or nowhere in full, so that parts are ours.
Certainty = Literal["code", "paper", "secondary", "reconstructed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An algorithm's settings and its two halves, both built from the settings alone."""

    name: str  # as recipes write it
    title: str
    paper: str
    kind: Kind
    certainty: Certainty
    config: type[AlgorithmConfig]
    pipeline: Callable[..., Pipeline]  # (config, *, outcomes, max_completion_length)
    objective: Callable[..., Objective]  # (config)
