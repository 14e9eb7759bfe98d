"""TreeRL (arXiv:2506.11902): answers are forked where the policy was surprised by itself.

Each prefix of the tree is worth what its leaves are; a token's credit is that worth and what its
part of the tree adds to it. The released code's credit is the default; the paper's own form is
remembered, not read, and the mean over tokens is ours.
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
    judging,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline
from grpo.tree_credit import Form


class Config(ClippedConfig):
    """Settings of TreeRL: 6 answers, 24 forks, 16 leaves trained on. Its runs: temperature 1.2."""

    num_generations: int = Field(
        6, ge=2, description="answers from the prompt; forks come on top of them"
    )
    num_rounds: int = Field(1, ge=0, description="of forks; 0: no tree")
    num_forks: int = Field(2, ge=1, description="tokens forked in each answer's tree, by round")
    num_continuations: int = Field(2, ge=1, description="of each fork")
    num_kept: int = Field(
        16, ge=2, description="leaves trained on, drawn at random with a right one if there is any"
    )
    form: Form = Field(
        "code", description="of the credit: the released code's, or the paper's as remembered"
    )
    leaf_weighting: Literal["sqrt", "none"] = Field(
        "sqrt", description="divide a node's credit by the root of the trained leaves below it"
    )
    shared_tokens: Literal["each", "once"] = Field(
        "each", description="tokens are trained in every leaf that has them, or in one"
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """Credit by state value and step value over a tree of forks; token mean."""
    judges = judging(outcomes)
    plain = answer_pipeline(
        config,
        rewards=reward_terms(config, outcomes),
        advantage=partial(
            tree_credit.state_values,
            keep=config.num_kept,
            weights=judges,
            form=config.form,
            root_of_leaves=config.leaf_weighting == "sqrt",
        ),
        aggregation=aggregation.token_mean,
    )
    kept = partial(tree_credit.chosen_leaves_only, keep=config.num_kept, weights=judges)
    once = (partial(trees.oldest_sharer_only, among=kept),)
    return replace(
        plain,
        plan=partial(
            tree_plans.surprise_forks,
            num_chains=config.num_generations,
            num_rounds=config.num_rounds,
            num_forks=config.num_forks,
            num_continuations=config.num_continuations,
        ),
        trained=(*plain.trained, kept, *(once if config.shared_tokens == "once" else ())),
        metrics=(trees.shape_metrics,),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set."""
    return clipped_objective(config)
