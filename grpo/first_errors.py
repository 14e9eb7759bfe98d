"""How far a wrong answer's reasoning was right: from the scores of its steps to a reward.

SGPO (arXiv:2505.11595). A step scorer gives each step 1 (right), 0 (wrong) or None (no step that
it can judge). Refuses to know how steps are cut and who judges them. Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grpo import advantage
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import is_constant, outcome_values
from grpo.types import Bool, Float64, Group, Score

Scope = Literal["all_wrong", "every_wrong"]
Unit = Literal["steps", "tokens"]
Shaping = Literal["logistic", "logistic_as_transcribed", "none"]
TruncatedLength = Literal["produced", "median"]

RIGHT = 0.5  # a step with a lower score is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """What the step scorer found in one wrong answer, in steps or in tokens."""

    right: float  # before the first wrong step
    length: float  # judged in all; 0: nothing was
    has_steps: bool  # the scorer was asked about some
    has_wrong_step: bool

    @property
    def is_unjudged(self) -> bool:
        """The scorer was asked and could judge none of the steps."""
        return self.has_steps and self.length == 0


def is_wrong(group: Group, *, scorer: str) -> Bool:
    """Which answers the task scorer judged and found wrong. [G]"""
    return outcome_values(group, scorer=scorer) <= 0  # NaN is not


def is_all_wrong(group: Group, *, scorer: str) -> bool:
    """No answer is right and some are wrong: outcomes alone teach nothing here."""
    has_right = bool((outcome_values(group, scorer=scorer) > 0).any())
    return not has_right and bool(is_wrong(group, scorer=scorer).any())


def places_to_judge(group: Group, *, scorer: str, scope: Scope) -> list[int]:
    """The answers whose steps matter."""
    if scope == "all_wrong" and not is_all_wrong(group, scorer=scorer):
        return []
    return [int(place) for place in np.flatnonzero(is_wrong(group, scorer=scorer))]


def stepwise_outcome(
    group: Group,
    state: State,
    *,
    scorer: str,
    weight: float,
    step_scorer: str,
    scope: Scope,
    unit: Unit,
    truncated_length: TruncatedLength,
    max_unjudged: float,
    shaping: Shaping,
    slope: float,
    threshold: float,
) -> Float64:
    """Weight times the outcome, and times the shaped share of right reasoning of wrong answers. [G]

    A group keeps its outcomes if more than a share `max_unjudged` of it could not be judged. The
    right shares 0, 1/2, 1/2, 7/8 of four wrong answers give 0.076, 0.5, 0.5, 0.867.
    """
    rewards = outcome_values(group, scorer=scorer)
    places = places_to_judge(group, scorer=scorer, scope=scope)
    found = {place: reasoning(group, place, step_scorer=step_scorer, unit=unit) for place in places}
    if sum(item.is_unjudged for item in found.values()) <= max_unjudged * len(group.rollouts):
        lengths = _lengths(group, found, truncated_length)
        for place, item in found.items():
            share = item.right / lengths[place] if item.length else 0.0
            rewards[place] = shaped(share, shaping=shaping, slope=slope, threshold=threshold)
    return weight * rewards


def reasoning(group: Group, place: int, *, step_scorer: str, unit: Unit) -> Reasoning:
    """What the step scores say of one wrong answer.

    If no step is wrong, the last one has to be. Steps right, right, wrong, right: 2 of 4.
    """
    scores = [s for s in group.scores if s.scorer == step_scorer and s.span.rollout == place]
    steps = sorted((s for s in scores if s.value is not None), key=lambda score: score.span.start)
    sizes = [_size(step, unit) for step in steps]
    wrong = [i for i, step in enumerate(steps) if step.value is not None and step.value < RIGHT]
    first_wrong = wrong[0] if wrong else len(steps) - 1
    return Reasoning(
        right=sum(sizes[:first_wrong]) if steps else 0.0,
        length=sum(sizes),
        has_steps=bool(scores),
        has_wrong_step=bool(wrong),
    )


def shaped(share: float, *, shaping: Shaping, slope: float, threshold: float) -> float:
    """logistic: 1 / (1 + exp(-slope * (share - threshold))), more for more right reasoning.

    arXiv:2505.11595 eq. 2. A transcription of it has the opposite sign, which pays for early
    mistakes; it is kept to compare with.
    """
    if shaping == "none":
        return share
    sign = 1.0 if shaping == "logistic" else -1.0
    return float(1.0 / (1.0 + np.exp(-sign * slope * (share - threshold))))


def standardized_all_wrong_scaled(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    ddof: int,
    eps: float,
    scorer: str,
    scale: float,
) -> list[PerToken]:
    """GRPO's advantages, scaled in groups without a right answer; they differ by reasoning only."""
    plain = advantage.standardized(groups, state, ddof=ddof, eps=eps)
    return [
        [scale * value for value in values] if is_all_wrong(item.group, scorer=scorer) else values
        for item, values in zip(groups, plain, strict=True)
    ]


def judge_metrics(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    scorer: str,
    step_scorer: str,
    scope: Scope,
    unit: Unit,
) -> Mapping[str, float]:
    """How often the step scorer was needed and what it said. A mean of nothing is absent."""
    all_wrong = [item for item in groups if is_all_wrong(item.group, scorer=scorer)]
    found = [
        reasoning(item.group, place, step_scorer=step_scorer, unit=unit)
        for item in groups
        for place in places_to_judge(item.group, scorer=scorer, scope=scope)
    ]
    means: dict[str, Sequence[float]] = {
        "right_share": [item.right / item.length for item in found if item.length],
        "frac_no_wrong_step": [not item.has_wrong_step for item in found if item.length],
        "frac_unjudged": [item.is_unjudged for item in found],
        "frac_all_wrong_constant": [is_constant(item.rewards) for item in all_wrong],
    }
    present = {f"judge/{name}": float(np.mean(part)) for name, part in means.items() if part}
    return present | {
        "judge/frac_all_wrong": len(all_wrong) / len(groups),
        "judge/num_rollouts": float(len(found)),
    }


def _lengths(
    group: Group, found: Mapping[int, Reasoning], truncated_length: TruncatedLength
) -> dict[int, float]:
    """What the right part is a share of. With `median`, a cut-off answer is at least that long."""
    judged = [item.length for item in found.values() if item.length]
    median = float(np.median(judged)) if judged and truncated_length == "median" else 0.0
    return {
        place: max(item.length, median if group.rollouts[place].is_truncated else 0.0)
        for place, item in found.items()
    }


def _size(step: Score, unit: Unit) -> float:
    return 1.0 if unit == "steps" else float(step.span.end - step.span.start)
