"""TreePO (arXiv:2508.17445): answers grow in segments that branch, and share what they share.

A leaf is compared with the leaves below each of its ancestors, from the whole group to its nearest
siblings; the mean of these is whitened over the step. How the paper draws the number of first
branches (2 to 8), and where it branches again once answers have ended, was not read.
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
    mixed_groups_only,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline


class Config(ClippedConfig):
    """Settings of TreePO, the released train script's: 14 segments of 512 tokens there."""

    num_generations: int = Field(16, ge=2, description="G, leaves per prompt")
    epsilon_high: float | None = Field(
        0.28, gt=0, description="the ratio is clipped above 1 + epsilon_high; null: epsilon"
    )
    segment_tokens: int = Field(512, ge=1, description="tokens between two branchings")
    num_roots: int = Field(2, ge=1, description="first branches, from the prompt")
    num_children: int = Field(
        2, ge=1, description="branches of a segment, while there are fewer than G leaves"
    )
    subtree_weight: Literal["equal", "size"] = Field(
        "equal",
        description="of each ancestor in a leaf's advantage; equal: train script; size: by its "
        "leaves, the library's default",
    )
    drop_constant_subtrees: bool = Field(
        False, description="pass over ancestors below which all rewards are equal"
    )
    dynamic_sampling: bool = Field(
        False, description="drop groups whose outcomes are all equal and sample others instead"
    )
    shared_tokens: Literal["each", "once"] = Field(
        "each",
        description="each: trained in every leaf that has them; once: in one of them, with the "
        "leaves' mean advantage",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Leaves of a segment tree against the leaves of their subtrees, whitened; token mean."""
    leaves = partial(
        tree_credit.subtree_centred,
        by_size=config.subtree_weight == "size",
        drop_constant=config.drop_constant_subtrees,
    )
    plain = answer_pipeline(
        config,
        select=(mixed_groups_only(outcomes),) if config.dynamic_sampling else (),
        rewards=reward_terms(config, outcomes),
        advantage=leaves,
        aggregation=aggregation.token_mean,
    )
    is_once = config.shared_tokens == "once"
    return replace(
        plain,
        plan=partial(
            tree_plans.segment_tree,
            num_leaves=config.num_generations,
            num_roots=config.num_roots,
            num_children=config.num_children,
            segment_tokens=config.segment_tokens,
            max_tokens=max_completion_length,
        ),
        advantage=partial(trees.averaged_over_sharers, advantage=leaves) if is_once else leaves,
        trained=(*plain.trained, trees.oldest_sharer_only) if is_once else plain.trained,
        metrics=(trees.shape_metrics,),
    )


def objective(config: Config) -> Objective:
    """PPO-clip with a higher upper bound."""
    return clipped_objective(config)
