"""What all members of the family accept beside their own idea: clip range, importance
correction, KL penalty, entropy bonus, weights of the scorers.

Refuses to know any algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from grpo import gates, penalties, ratios, rewards, surrogates
from grpo.config import AlgorithmConfig
from grpo.objective import Gate, Objective, Penalty, Signal
from grpo.pipeline import Reward

KL_ESTIMATORS = {"k2": penalties.k2, "k3": penalties.k3}


class ClippedConfig(AlgorithmConfig):
    """Settings of a member that compares the answers of a group and clips the ratio."""

    num_generations: int = Field(8, ge=2, description="G, rollouts per prompt; 1 has no baseline")
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


class StandardizedConfig(ClippedConfig):
    """Settings of a member that divides rewards by the standard deviation of their group.

    Papers say only "std"; the defaults are those of TRL.
    """

    std_ddof: Literal[0, 1] = Field(1, description="1: sample deviation, 0: population deviation")
    std_eps: float = Field(1e-4, ge=0, description="added to the group's standard deviation")


def clipped_objective(config: ClippedConfig) -> Objective:
    """PPO-clip on token ratios with the corrections and penalties that the config switches on."""
    return Objective(
        log_ratio=ratios.token_log_ratio,
        surrogate=partial(
            surrogates.clipped, low=config.epsilon, high=config.clip_high, delta=config.delta
        ),
        gates=importance_gates(config),
        penalties=penalty_terms(config),
        needs=needed_signals(config),
    )


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


def importance_gates(config: AlgorithmConfig) -> tuple[Gate, ...]:
    """The correction for tokens that other weights or another engine sampled."""
    if config.importance_cap is None:
        return ()
    return (partial(gates.truncated_importance, cap=config.importance_cap),)


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
