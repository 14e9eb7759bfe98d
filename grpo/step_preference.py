"""Was each step worth taking? From the utilities of consecutive prefixes to reward terms (WS-GRPO).

arXiv:2602.17025. A prefix scorer gives each prefix a utility f; a step is preferred with
sigmoid(f after - f before), of which an answer's reward has the mean. Refuses to know how utilities
come about. Shapes: G rollouts in a group, N steps of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.rewards import is_constant, total_outcome
from grpo.steps import step_spans
from grpo.types import Bool, Float64, Group

Reduction = Literal["mean", "sum"]

UNINFORMATIVE = 0.5  # what is said of an answer without steps


def step_preferences(utilities: Float64, *, literal_order: bool) -> Float64:
    """Of N + 1 utilities, that of the empty prefix first. [N]

    0, 0.4, 1, 0.7: 0.5987, 0.6457, 0.4256. literal_order takes the paper's argument order at its
    word, by which a good step has a low preference: 1 minus these.
    """
    gains = np.diff(utilities)
    return 1.0 / (1.0 + np.exp(gains if literal_order else -gains))


def answer_preferences(
    group: Group, *, scorer: str, literal_order: bool, reduction: Reduction
) -> Float64:
    """The mean or sum over the steps of each answer; 1/2 without steps, NaN if unscored. [G]"""
    found = []
    for utilities in prefix_utilities(group, scorer=scorer):
        steps = step_preferences(utilities, literal_order=literal_order)
        total = steps.mean() if reduction == "mean" and len(steps) else steps.sum()
        found.append(float(total) if len(steps) else UNINFORMATIVE)
    return np.array(found, np.float64)


def prefix_utilities(group: Group, *, scorer: str) -> list[Float64]:
    """Of each rollout, the shortest prefix first; NaN where the scorer does not apply."""
    found: list[list[tuple[int, float]]] = [[] for _ in group.rollouts]
    for score in group.scores:
        if score.scorer == scorer and score.span.start == 0:
            value = np.nan if score.value is None else score.value
            found[score.span.rollout].append((score.span.end, value))
    return [np.array([value for _, value in sorted(pairs)], np.float64) for pairs in found]


def step_preference(
    group: Group,
    state: State,
    *,
    scorer: str,
    outcomes: Mapping[str, float],
    coefficient: float,
    literal_order: bool,
    reduction: Reduction,
    only_mixed: bool,
) -> Float64:
    """Coefficient times the preference of the answer's steps. [G]

    only_mixed: 0 in groups whose outcomes are equal, which then teach nothing, as in GRPO.
    """
    values = answer_preferences(
        group, scorer=scorer, literal_order=literal_order, reduction=reduction
    )
    counted = np.where(_is_silent(group, outcomes, only_mixed), 0.0, coefficient * values)
    return np.where(is_rewarded(group, scorer=scorer, outcomes=outcomes), counted, np.nan)


def finished_outcome(
    group: Group,
    state: State,
    *,
    scorer: str | None,
    outcomes: Mapping[str, float],
    coefficient: float,
    truncated_is_wrong: bool,
) -> Float64:
    """Coefficient times the weighted outcome, 0 for an answer that the token budget cut off. [G]"""
    values = total_outcome(group, weights=outcomes)
    if truncated_is_wrong:
        is_cut_off = np.array([rollout.is_truncated for rollout in group.rollouts], bool)
        values = np.where(is_cut_off & ~np.isnan(values), 0.0, values)
    counted = coefficient * values
    return np.where(is_rewarded(group, scorer=scorer, outcomes=outcomes), counted, np.nan)


def steps_out_of_range(
    group: Group,
    state: State,
    *,
    scorer: str | None,
    outcomes: Mapping[str, float],
    coefficient: float,
    at_least: int,
    at_most: int,
    min_chars: int,
    only_mixed: bool,
) -> Float64:
    """-coefficient for each step that an answer has too few or too many. [G]

    3, 7, 2 and 4 steps, 3 to 6 allowed, coefficient 0.5: 0, -0.5, -0.5, 0.
    """
    counts = num_steps(group, min_chars=min_chars)
    excess = np.maximum(at_least - counts, 0) + np.maximum(counts - at_most, 0)
    counted = np.where(_is_silent(group, outcomes, only_mixed), 0.0, -coefficient * excess)
    return np.where(is_rewarded(group, scorer=scorer, outcomes=outcomes), counted, np.nan)


def num_steps(group: Group, *, min_chars: int) -> Float64:
    """Steps of each answer. [G]"""
    counts = [
        len(step_spans(rollout, place, min_chars=min_chars))
        for place, rollout in enumerate(group.rollouts)
    ]
    return np.array(counts, np.float64)


def is_rewarded(group: Group, *, scorer: str | None, outcomes: Mapping[str, float]) -> Bool:
    """Which answers have an outcome, and utilities if they are asked for: all terms or none. [G]"""
    missing: Bool = np.isnan(total_outcome(group, weights=outcomes))
    if scorer is None:
        return ~missing
    utilities = prefix_utilities(group, scorer=scorer)
    missing |= np.array([np.isnan(values).any() for values in utilities], bool)
    return ~missing


def step_metrics(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    scorer: str | None,
    outcomes: Mapping[str, float],
    literal_order: bool,
    reduction: Reduction,
    at_least: int,
    at_most: int,
    min_chars: int,
) -> Mapping[str, float]:
    """How many steps answers have, and whether preferred answers are the right ones.

    A negative `outcome_correlation` says that the policy is paid for pleasing the preference
    model. It is absent where either side is constant.
    """
    counts = np.concatenate([num_steps(item.group, min_chars=min_chars) for item in groups])
    found = {
        "steps/mean": float(counts.mean()),
        "steps/frac_out_of_range": float(((counts < at_least) | (counts > at_most)).mean()),
    }
    if scorer is None:
        return found
    preferences = np.concatenate(
        [
            answer_preferences(
                item.group, scorer=scorer, literal_order=literal_order, reduction=reduction
            )
            for item in groups
        ]
    )
    right = np.concatenate([total_outcome(item.group, weights=outcomes) for item in groups])
    present = ~np.isnan(preferences) & ~np.isnan(right)
    pair = preferences[present], right[present]
    if not any(is_constant(values) for values in pair):
        found["step_preference/outcome_correlation"] = float(np.corrcoef(*pair)[0, 1])
    return found


def _is_silent(group: Group, outcomes: Mapping[str, float], only_mixed: bool) -> bool:
    return only_mixed and is_constant(total_outcome(group, weights=outcomes))
