"""The driver's half of an algorithm: a frozen record of pure functions over groups.

Each point holds `functools.partial` objects (or plain functions), so that a pipeline can be
printed: the function's name and its settings are all there is to it. Refuses to know who calls
it, when, and on which machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.types import (
    Bool,
    Dropped,
    Float64,
    Group,
    Prompt,
    RolloutPlan,
    Span,
    StepReport,
    TrainRow,
)

# The algorithm's own memory (guidance length, prompt history, ...): a frozen record or None.
State = object | None

PerToken = list[Float64]  # one [T] array per rollout of a group


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardedGroup:
    """A group with its rewards: one column per reward term, NaN where a term does not apply."""

    group: Group
    components: Float64  # [G, K]

    @property
    def rewards(self) -> Float64:
        """[G] sum of the terms that apply; NaN where none does."""
        total = np.nansum(self.components, axis=1)
        return np.where(np.isnan(self.components).all(axis=1), np.nan, total)


Skip = Callable[[Prompt, State], str | None]  # the reason to sample nothing for this prompt
Plan = Callable[[Group, State], tuple[RolloutPlan, ...]]
Labels = Callable[[Group, State], Float64]  # [G]
# (group so far, all scorers) -> what each has to judge next; asked until nothing is left to judge
Spans = Callable[[Group, tuple[str, ...]], Mapping[str, tuple[Span, ...]]]
Select = Callable[[Group, State], Group | Dropped]
Reward = Callable[[Group, State], Float64]  # [G], NaN: does not apply
Advantage = Callable[[Sequence[RewardedGroup], State], list[PerToken]]
TrainedMask = Callable[[Group, State], list[Bool]]  # which tokens count, in numerator and mean
TokenWeight = Callable[[Group, State], PerToken]
Aggregation = Callable[[Sequence[list[Bool]]], list[PerToken]]  # masks of an update -> coefficients
Adapt = Callable[[State, Sequence[RewardedGroup], StepReport], State]
Metrics = Callable[[Sequence[RewardedGroup], State], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A [T] stream that the learner computes under its present weights before rewards are formed.

    It is found as `rollout.measured[name]`; `Objective.measures` says how it is computed.
    """

    name: str
    labels: Labels | None = None  # what the computation has to know of each rollout; None: nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Another kind of update now and then, on rows that the steps before it left behind."""

    every: int  # steps
    collect: Callable[[RewardedGroup, State], tuple[TrainRow, ...]]  # rows that one group leaves
    groups_per_update: int  # rows of the same `TrainRow.group` stay in one update
    learning_rate_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """From a prompt to the numbers that the learner sums; `docs/algorithms.md` has one row each."""

    plan: Plan
    spans: Spans
    select: tuple[Select, ...]  # in order; the first Dropped ends the group
    rewards: tuple[Reward, ...]  # the K terms
    advantage: Advantage
    trained: tuple[TrainedMask, ...]  # a token is trained if every mask says so
    token_weight: tuple[TokenWeight, ...]  # scale the policy term; multiplied together
    aggregation: Aggregation
    adapt: Adapt
    # Scale the whole loss of a token, penalties included, and leave the means as they are.
    loss_weight: tuple[TokenWeight, ...] = ()
    metrics: tuple[Metrics, ...] = ()  # what the algorithm itself wants plotted; changes nothing
    skip: tuple[Skip, ...] = ()  # asked in order before a prompt is sampled
    # Plans of a later wave see the scores of the earlier ones; else scoring follows the last wave.
    scores_between_waves: bool = False
    measures: tuple[Measured, ...] = ()
    stage: Stage | None = None
    initial_state: State = None
