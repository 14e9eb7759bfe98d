"""All algorithms by name. One explicit dict: to add one, write its file and its line here.

Importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo.algorithms import dapo, dr_grpo, grpo
from grpo.config import AlgorithmConfig
from grpo.objective import Objective
from grpo.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An algorithm's settings and its two halves, both built from the settings alone."""

    name: str  # as recipes write it
    title: str
    paper: str
    config: type[AlgorithmConfig]
    pipeline: Callable[..., Pipeline]  # (config, *, outcomes, max_completion_length)
    objective: Callable[..., Objective]  # (config)


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        name="grpo",
        title="GRPO",
        paper="arXiv:2402.03300",
        config=grpo.Config,
        pipeline=grpo.pipeline,
        objective=grpo.objective,
    ),
    "dr_grpo": Algorithm(
        name="dr_grpo",
        title="Dr. GRPO",
        paper="arXiv:2503.20783",
        config=dr_grpo.Config,
        pipeline=dr_grpo.pipeline,
        objective=dr_grpo.objective,
    ),
    "dapo": Algorithm(
        name="dapo",
        title="DAPO",
        paper="arXiv:2503.14476",
        config=dapo.Config,
        pipeline=dapo.pipeline,
        objective=dapo.objective,
    ),
}
