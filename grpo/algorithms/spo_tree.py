"""SPO-tree, segment policy optimisation (arXiv:2505.23564): credit for parts of an answer.

Answers grow in segments that branch; a segment is compared with those beside it, and each is
trained once. For long answers. The mean over tokens was not read: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from grpo import aggregation, tree_credit, tree_plans, trees
from grpo.algorithms.options import (
    ClippedConfig,
    answer_pipeline,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline, TrainedMask
from grpo.tree_credit import Baseline


class Config(ClippedConfig):
    """Settings of SPO-tree: 6-6-6, which is 216 leaves."""

    num_generations: int = Field(6, ge=2, description="branches of each node")
    num_levels: int = Field(3, ge=1, description="of branching; 1: no tree")
    segment_tokens: int = Field(600, ge=1, description="of all levels but the last")
    baseline: Baseline = Field(
        "leave_one_out", description="what a node's value is compared with: those beside it"
    )
    baseline_ddof: Literal[0, 1] = Field(
        0, description="of baseline standardized; 1: sample deviation, 0: population deviation"
    )
    baseline_eps: float = Field(1e-8, ge=0, description="of baseline standardized")
    shared_tokens: Literal["once", "each"] = Field(
        "once", description="an edge is trained once, or in every leaf below it"
    )
    drop_equal_edges: bool = Field(
        True, description="edges of advantage 0 are in neither the loss nor its mean"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """A segment's value against that of its siblings; token mean over the edges that differ."""
    rewards = reward_terms(config, outcomes)
    plain = answer_pipeline(
        config,
        rewards=rewards,
        advantage=partial(
            tree_credit.sibling_advantages,
            baseline=config.baseline,
            ddof=config.baseline_ddof,
            eps=config.baseline_eps,
        ),
        aggregation=aggregation.token_mean,
    )
    masks: tuple[TrainedMask, ...] = plain.trained
    if config.shared_tokens == "once":
        masks += (trees.oldest_sharer_only,)
    if config.drop_equal_edges:
        masks += (partial(tree_credit.edges_with_advantage, rewards=rewards),)
    return replace(
        plain,
        plan=partial(
            tree_plans.uniform_tree,
            num_children=config.num_generations,
            num_levels=config.num_levels,
            segment_tokens=config.segment_tokens,
            max_tokens=max_completion_length,
        ),
        trained=masks,
        metrics=(trees.shape_metrics,),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
