"""lambda-GRPO of "GRPO is secretly a process reward model" (arXiv:2509.21154).

Answers of a group that begin alike make GRPO count their common tokens once per answer. Here each
process step counts once: a token's whole loss, KL term included, is divided by the number of
answers that share the prefix ending in it. Not the lambda-GRPO of arXiv:2510.06870.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import adaptation, advantage, aggregation, plans, prefix_sets, spans, token_weights
from grpo.algorithms.options import StandardizedConfig, clipped_objective, reward_terms
from grpo.objective import Objective
from grpo.pipeline import Advantage, Pipeline, TrainedMask

MEANS = {"token_mean": aggregation.token_mean, "sequence_mean": aggregation.sequence_mean}


class Config(StandardizedConfig):
    """Settings of lambda-GRPO and of the controls that its claims need."""

    num_generations: int = Field(6, ge=2, description="G, rollouts per prompt; the paper's k")
    loss_scale: Literal["process_sets", "none", "norm_matched"] = Field(
        "process_sets",
        description="process_sets: divide by the number of answers that share the prefix; none: "
        "GRPO; norm_matched: GRPO with each group's update as small as process_sets makes it",
    )
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean",
        description="token_mean: the theory's; sequence_mean: default of the released program",
    )
    credit: Literal["outcome", "process"] = Field(
        "outcome",
        description="advantage of a token: of its answer, or the mean over the answers that share "
        "its prefix; the same update (theorem 1) unless clipping acts",
    )
    train_end_of_sequence: bool = Field(
        True,
        description="false: as the released code does where the padding token is the "
        "end-of-sequence token",
    )
    count_roots: bool = Field(
        False, description="tree metrics: count what all G answers share as a process step"
    )
    count_leaves: bool = Field(
        False, description="tree metrics: count what one answer has alone as a process step"
    )

    @model_validator(mode="after")
    def _control_has_outcome_credit(self) -> Self:
        if self.loss_scale == "norm_matched" and self.credit == "process":
            raise ValueError(
                "loss_scale is norm_matched and credit is process: the control matches the update "
                "of outcome advantages; set credit: outcome"
            )
        return self


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO with each token's loss divided by the size of its process set."""
    trained: tuple[TrainedMask, ...] = (token_weights.policy_tokens_only,)
    if not config.train_end_of_sequence:
        trained += (token_weights.not_end_of_sequence,)
    is_scaled = config.loss_scale == "process_sets"
    tree = partial(
        prefix_sets.tree_metrics, count_roots=config.count_roots, count_leaves=config.count_leaves
    )
    return Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=(),
        rewards=reward_terms(config, outcomes),
        advantage=_advantage(config),
        trained=trained,
        token_weight=(),
        aggregation=MEANS[config.aggregation],
        adapt=adaptation.unchanged,
        loss_weight=(prefix_sets.inverse_set_size,) if is_scaled else (),
        metrics=(tree,),
    )


def objective(config: Config) -> Objective:
    """PPO-clip, symmetric unless `epsilon_high` is set; the released code clips at 0.2."""
    return clipped_objective(config)


def _advantage(config: Config) -> Advantage:
    ddof, eps = config.std_ddof, config.std_eps
    if config.loss_scale == "norm_matched":
        mean = MEANS[config.aggregation]
        return partial(prefix_sets.norm_matched, ddof=ddof, eps=eps, aggregation=mean)
    if config.credit == "process":
        return partial(prefix_sets.process_advantages, ddof=ddof, eps=eps)
    return partial(advantage.standardized, ddof=ddof, eps=eps)
