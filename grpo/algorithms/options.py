"""What members of the family share beside their own idea: clip range, importance correction, KL
penalty, entropy bonus, weights of the scorers, length rewards, and the points they have in common.

Refuses to know any algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import (
    adaptation,
    gates,
    length_rewards,
    penalties,
    plans,
    ratios,
    rewards,
    selection,
    spans,
    surrogates,
    token_weights,
)
from grpo import advantage as advantages
from grpo.config import AlgorithmConfig
from grpo.measures import REFERENCE
from grpo.objective import Gate, LogRatio, Objective, Penalty, Signal, SurrogateFn
from grpo.pipeline import Advantage, Aggregation, Measured, Pipeline, Reward, Select

KL_ESTIMATORS = {
    "k2": penalties.k2,
    "k3": penalties.k3,
    "k3_plus": penalties.k3_plus,
    "k3_unbiased": penalties.k3_unbiased,
}
TRUNCATED = {
    "token": gates.truncated_importance,
    "sequence": gates.truncated_sequence_importance,
}
MASKED = {
    "token": gates.masked_importance,
    "sequence": gates.masked_sequence_importance,
    "geometric": gates.geometric_filter,
}


GROUP_LENGTH_REWARDS = {
    "kimi": length_rewards.relative_length,
    "shorter_better": length_rewards.distance_to_shortest_right,
}
BUDGET_LENGTH_REWARDS = {
    "l1_exact": length_rewards.distance_to_budget,
    "l1_max": length_rewards.within_budget,
}
LENGTH_COEFFICIENTS = {"kimi": 1.0, "shorter_better": 0.001, "l1_exact": 3e-4, "l1_max": 3e-4}


class LengthRewardConfig(AlgorithmConfig):
    """Settings of a member that can add a reward for the length of an answer.

    Coefficients of shorter_better and of l1_max are remembered, not read in the papers.
    """

    length_reward: Literal["none", "kimi", "shorter_better", "l1_exact", "l1_max"] = Field(
        "none", description="a reward term for length beside those of the scorers"
    )
    length_coef: float | None = Field(
        None,
        gt=0,
        description="its coefficient; null: kimi 1, shorter_better 0.001 per token, l1_exact and "
        "l1_max 0.0003 per token",
    )
    length_budget_column: str = Field(
        "token_budget", description="column of the data with the budget of l1_exact and l1_max"
    )


class GroupConfig(LengthRewardConfig):
    """Settings of a member that compares the answers of a group."""

    num_generations: int = Field(8, ge=2, description="G, rollouts per prompt; 1 has no baseline")


class ClippedConfig(GroupConfig):
    """Settings of a member that compares the answers of a group and clips the ratio."""

    epsilon: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = Field(
        None, gt=0, description="the ratio is clipped above 1 + epsilon_high; null: epsilon"
    )
    delta: float | None = Field(
        None,
        gt=1,
        description="upper bound of the ratio when the advantage is negative; null: none",
    )

    @property
    def clip_high(self) -> float:
        """epsilon_high, or epsilon where it is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def _delta_lies_beyond_the_clip_range(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"delta is {self.delta:g}, but it must exceed 1 + epsilon_high = "
                f"{1 + self.clip_high:g}: raise delta (INTELLECT-2 uses 4) or leave it null"
            )
        return self


class DeviationConfig(GroupConfig):
    """Settings of a member that divides rewards by the standard deviation of their group.

    Papers say only "std"; the defaults are those of TRL.
    """

    std_ddof: Literal[0, 1] = Field(1, description="1: sample deviation, 0: population deviation")
    std_eps: float = Field(1e-4, ge=0, description="added to the group's standard deviation")


class StandardizedConfig(ClippedConfig, DeviationConfig):
    """Settings of a member that divides by the deviation and clips the ratio."""


class RightAnswerConfig(AlgorithmConfig):
    """Settings of a member that asks of each answer whether it is right."""

    right_above: float = Field(
        0.0, description="an answer is right if the weighted sum of its scores is above this"
    )


def with_knobs(
    build: Callable[..., Pipeline],
    config: AlgorithmConfig,
    *,
    outcomes: Mapping[str, float],
    max_completion_length: int,
) -> Pipeline:
    """A member's pipeline with the knobs that every member has (arXiv:2404.14367, and k1).

    A user's pipeline that is made from a member's has them already: they act once.
    """
    pipeline = build(config, outcomes=outcomes, max_completion_length=max_completion_length)
    if config.kl_in_reward != 0 and not _pays_for_kl(pipeline):
        kl = partial(rewards.kl_to_reference, coefficient=config.kl_in_reward)
        asked = dict.fromkeys((*pipeline.measures, *kl_measured(config)))
        pipeline = replace(pipeline, rewards=(*pipeline.rewards, kl), measures=tuple(asked))
    if config.reward_margin is not None and not _is_one(
        pipeline.select, selection.drop_if_small_margin
    ):
        enough = partial(
            selection.drop_if_small_margin, weights=judging(outcomes), margin=config.reward_margin
        )
        pipeline = replace(pipeline, select=(enough, *pipeline.select))
    if config.negative_scale != 1 and not _is_one(
        (pipeline.advantage,), advantages.negative_scaled
    ):
        scaled = partial(
            advantages.negative_scaled, advantage=pipeline.advantage, scale=config.negative_scale
        )
        pipeline = replace(pipeline, advantage=scaled)
    return pipeline


def with_objective_knobs(build: Callable[..., Objective], config: AlgorithmConfig) -> Objective:
    """A member's objective with what the knobs of its pipeline ask the learner for."""
    objective = build(config)
    if config.kl_in_reward == 0 or REFERENCE in objective.measures:
        return objective
    return replace(objective, measures=(*objective.measures, REFERENCE))


def refuse_kl_among_decoupled(config: AlgorithmConfig) -> None:
    """ValueError where rewards are standardised one by one and the KL term would be, too."""
    if config.kl_in_reward:
        raise ValueError(
            f"kl_in_reward is {config.kl_in_reward:g}, but each reward is standardised by itself, "
            "so a coefficient of the KL term would mean nothing: set beta instead"
        )


def _pays_for_kl(pipeline: Pipeline) -> bool:
    """In a reward term, or token by token in its advantage."""
    advantage = pipeline.advantage
    by_token = isinstance(advantage, partial) and advantage.keywords.get("kl_coef") is not None
    return by_token or _is_one(pipeline.rewards, rewards.kl_to_reference)


def _is_one(point: Sequence[Callable[..., object]], function: Callable[..., object]) -> bool:
    return any(isinstance(item, partial) and item.func is function for item in point)


def answer_pipeline(
    config: AlgorithmConfig,
    *,
    rewards: tuple[Reward, ...],
    advantage: Advantage,
    aggregation: Aggregation,
    select: tuple[Select, ...] = (),
) -> Pipeline:
    """Independent answers, judged as a whole, trained on every token that the policy wrote."""
    return Pipeline(
        plan=partial(plans.independent, num_generations=config.num_generations),
        spans=spans.whole_answer,
        select=select,
        rewards=rewards,
        advantage=advantage,
        trained=(token_weights.policy_tokens_only,),
        token_weight=(),
        aggregation=aggregation,
        adapt=adaptation.unchanged,
    )


def plain_objective(
    config: AlgorithmConfig, *, surrogate: SurrogateFn, log_ratio: LogRatio = ratios.token_log_ratio
) -> Objective:
    """A surrogate with the corrections and penalties that the config switches on."""
    return Objective(
        log_ratio=log_ratio,
        surrogate=surrogate,
        gates=importance_gates(config),
        penalties=penalty_terms(config),
        needs=needed_signals(config),
    )


def clipped_objective(
    config: ClippedConfig, *, log_ratio: LogRatio = ratios.token_log_ratio
) -> Objective:
    """PPO-clip with the corrections and penalties that the config switches on."""
    clip = partial(
        surrogates.clipped, low=config.epsilon, high=config.clip_high, delta=config.delta
    )
    return plain_objective(config, surrogate=clip, log_ratio=log_ratio)


def outcome_terms(outcomes: Mapping[str, float]) -> tuple[Reward, ...]:
    """One reward term per scorer. A weight of 0 only logs: the scorer is no term at all."""
    terms = tuple(
        partial(rewards.weighted_outcome, scorer=scorer, weight=weight)
        for scorer, weight in outcomes.items()
        if weight != 0
    )
    if not terms:
        raise ValueError(
            f"no scorer has a weight other than 0 (scorers and weights: {dict(outcomes)}), so "
            "every reward would be missing: give at least one scorer a weight"
        )
    return terms


def reward_terms(config: LengthRewardConfig, outcomes: Mapping[str, float]) -> tuple[Reward, ...]:
    """One term per scorer, and the length reward that the config switches on."""
    return outcome_terms(outcomes) + length_terms(config, outcomes)


def length_terms(config: LengthRewardConfig, outcomes: Mapping[str, float]) -> tuple[Reward, ...]:
    """The length reward that the config switches on, if any."""
    kind = config.length_reward
    if kind == "none":
        return ()
    coef = LENGTH_COEFFICIENTS[kind] if config.length_coef is None else config.length_coef
    judges = judging(outcomes)
    if kind in GROUP_LENGTH_REWARDS:
        return (partial(GROUP_LENGTH_REWARDS[kind], weights=judges, coefficient=coef),)
    column = config.length_budget_column
    term = BUDGET_LENGTH_REWARDS[kind]
    return (partial(term, weights=judges, coefficient=coef, column=column),)


def kl_measured(config: AlgorithmConfig) -> tuple[Measured, ...]:
    """What the driver asks for so that the KL term can stand in the reward."""
    return () if config.kl_in_reward == 0 else (Measured(name=REFERENCE.name),)


def judging(outcomes: Mapping[str, float]) -> dict[str, float]:
    """The scorers that count, with their weights."""
    return {scorer: weight for scorer, weight in outcomes.items() if weight != 0}


def mixed_groups_only(outcomes: Mapping[str, float]) -> Select:
    """Dynamic sampling: other prompts take the place of groups whose outcomes are equal."""
    return partial(selection.drop_if_constant_outcome, scorers=tuple(judging(outcomes)))


def importance_gates(config: AlgorithmConfig) -> tuple[Gate, ...]:
    """The corrections for tokens that other weights or another engine sampled."""
    chosen: tuple[Gate, ...] = ()
    cap, level = config.importance_cap, config.importance_level
    if cap is not None and config.correction == "tis":
        chosen += (partial(TRUNCATED[level], cap=cap),)
    if cap is not None and config.correction == "mis":
        floor = 0.0 if config.importance_floor is None else config.importance_floor
        chosen += (partial(MASKED[level], low=floor, high=cap),)
    if config.off_policy_delta is not None:
        chosen += (partial(gates.off_policy_filter, delta=config.off_policy_delta),)
    return chosen


def penalty_terms(config: AlgorithmConfig) -> tuple[Penalty, ...]:
    """KL to the reference and entropy bonus, where their coefficients are not 0."""
    terms = (
        Penalty(name="kl", coefficient=config.beta, fn=KL_ESTIMATORS[config.kl_estimator]),
        Penalty(name="entropy", coefficient=-config.entropy_coef, fn=penalties.entropy),
    )
    return tuple(term for term in terms if term.coefficient != 0)


def needed_signals(config: AlgorithmConfig) -> frozenset[Signal]:
    """What the penalties ask the learner to compute."""
    wanted = {Signal.REFERENCE: config.beta, Signal.ENTROPY: config.entropy_coef}
    return frozenset(signal for signal, coefficient in wanted.items() if coefficient != 0)
