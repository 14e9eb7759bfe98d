"""DAPO (arXiv:2503.14476): GRPO with clip-higher, dynamic sampling, a token-level loss, overlong
filtering and soft overlong punishment.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from grpo import adaptation, advantage, aggregation, plans, rewards, selection, spans, token_weights
from grpo.algorithms.options import (
    LengthRewardConfig,
    StandardizedConfig,
    clipped_objective,
    reward_terms,
)
from grpo.objective import Objective
from grpo.pipeline import Pipeline, Reward, Select, TrainedMask


class Config(StandardizedConfig, LengthRewardConfig):
    """Settings of DAPO with the paper's values; all but the token-level loss can be off."""

    num_generations: int = Field(16, ge=2, description="G, rollouts per prompt")
    epsilon_high: float | None = Field(
        0.28, gt=0, description="the ratio is clipped above 1 + epsilon_high; null: epsilon"
    )
    dynamic_sampling: bool = Field(
        True, description="drop groups whose outcomes are all equal and sample others instead"
    )
    mask_truncated_completions: bool = Field(
        True, description="do not train on answers that the token budget cut off"
    )
    soft_overlong_cache: int | None = Field(
        None,
        ge=0,
        description="tokens before max_completion_length over which the penalty grows to -1; "
        "null: a fifth of max_completion_length, as in the paper; 0: no penalty",
    )


def pipeline(
    config: Config, *, outcomes: Mapping[str, float], max_completion_length: int
) -> Pipeline:
    """GRPO's advantages on shaped rewards of mixed groups; every trained token weighs the same."""
    select: tuple[Select, ...] = ()
    if config.dynamic_sampling:
        judges = tuple(scorer for scorer, weight in outcomes.items() if weight != 0)
        select = (partial(selection.drop_if_constant_outcome, scorers=judges),)
    trained: tuple[TrainedMask, ...] = (token_weights.policy_tokens_only,)
    if config.mask_truncated_completions:
        trained += (token_weights.not_truncated,)
    return Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=select,
        rewards=reward_terms(config, outcomes) + _length_terms(config, max_completion_length),
        advantage=partial(advantage.standardized, ddof=config.std_ddof, eps=config.std_eps),
        trained=trained,
        token_weight=(),
        aggregation=aggregation.token_mean,
        adapt=adaptation.unchanged,
    )


def objective(config: Config) -> Objective:
    """PPO-clip with more room above than below."""
    return clipped_objective(config)


def _length_terms(config: Config, max_tokens: int) -> tuple[Reward, ...]:
    cache = config.soft_overlong_cache
    if cache == 0:
        return ()
    if cache is None:
        cache = max(max_tokens // 5, 1)  # 4096 of 20480 in the paper
    if cache > max_tokens:
        raise ValueError(
            f"algorithm.soft_overlong_cache is {cache}, but sampling.max_completion_length is "
            f"{max_tokens}: set it to a part of that, or to 0 for no length penalty"
        )
    return (partial(rewards.soft_overlong, max_tokens=max_tokens, cache_tokens=cache),)
