"""A DPO stage beside the steps of an algorithm: its settings, its rows' rhythm and its loss.

Refuses to know how pairs are found.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field

from grpo import dpo, ratios, surrogates
from grpo.config import AlgorithmConfig
from grpo.objective import Objective
from grpo.pairs import Collect
from grpo.pipeline import Stage


class PreferenceStageConfig(AlgorithmConfig):
    """Settings of a member with a DPO stage. The reference is the policy at its start."""

    dpo_beta: float = Field(0.1, gt=0, description="of DPO: the smaller, the further it may go")
    dpo_every: int = Field(1, ge=1, description="steps from one stage of DPO to the next")
    dpo_pairs_per_update: int = Field(32, ge=1, description="pairs of one optimiser update")
    dpo_learning_rate_scale: float = Field(
        1.0, gt=0, description="learning rate of DPO over that of the step before"
    )


def preference_stage(config: PreferenceStageConfig, collect: Collect) -> Stage:
    """The driver's half: which rows each group leaves, and when they are trained on."""
    return Stage(
        every=config.dpo_every,
        collect=collect,
        groups_per_update=config.dpo_pairs_per_update,
        learning_rate_scale=config.dpo_learning_rate_scale,
    )


def preference_objective(config: PreferenceStageConfig) -> Objective:
    """The learner's half: DPO, as advantages of the log-likelihood."""
    return Objective(
        log_ratio=ratios.token_log_ratio,
        surrogate=surrogates.log_likelihood,
        group_term=partial(dpo.preference_advantages, beta=config.dpo_beta),
    )
