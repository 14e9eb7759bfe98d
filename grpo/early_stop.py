"""Answers written in segments, of which those that get no better are stopped (option of WS-GRPO).

After each segment the preference model judges the steps that are complete; an answer whose last
steps were not worth taking is not continued. Refuses to know who judges. Beyond the paper.
Shapes: G rollouts in a group, N steps of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.spans import answers_and_prefixes, not_scored_yet
from grpo.step_preference import step_preferences
from grpo.steps import step_spans
from grpo.types import Float64, Group, Origin, Prefix, Rollout, RolloutPlan, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """When an answer is stopped, and what becomes of it."""

    scorer: str  # gives prefixes their utility
    segment_tokens: int
    below: float  # a step with a lower preference was not worth taking
    patience: int  # so many such steps in a row, at the end, stop the answer
    phrase: str  # asks a stopped answer for its result; empty: it ends as it is
    answer_tokens: int  # room for phrase and result
    max_tokens: int  # of a completion
    min_chars: int  # of a step
    literal_order: bool


def segment_by_segment(
    group: Group, state: State, *, num_generations: int, rule: StopRule
) -> tuple[RolloutPlan, ...]:
    """All answers for one segment; then a further one for each that is neither done nor stopped."""
    if not group.rollouts:
        return (RolloutPlan(max_new_tokens=rule.segment_tokens),) * num_generations
    plans = [_next_plan(group, place, rule) for place in range(len(group.rollouts))]
    return tuple(plan for plan in plans if plan is not None)


def spans_of_segments(
    group: Group, scorers: tuple[str, ...], *, rule: StopRule
) -> Mapping[str, tuple[Span, ...]]:
    """Of an answer under way the prefixes that end a complete step; of a finished one everything.

    What follows the last complete step may still grow, so it is not judged yet.
    """
    finished = answers_and_prefixes(
        group, scorers, prefix_scorer=rule.scorer, min_chars=rule.min_chars
    )
    prefixes = [
        Span(rollout=place, start=0, end=end)
        for place, rollout in enumerate(group.rollouts)
        if is_under_way(rollout, rule)
        for end in complete_ends(rollout, rule)
    ]
    unjudged = not_scored_yet(group, rule.scorer, prefixes)
    waiting = {span.rollout for span in unjudged}
    done = {
        place
        for place in range(len(group.rollouts))
        if place not in waiting and _next_plan(group, place, rule) is None
    }
    wanted = {
        name: tuple(s for s in spans if s.rollout in done) for name, spans in finished.items()
    }
    return wanted | {rule.scorer: unjudged + wanted[rule.scorer]}


def is_under_way(rollout: Rollout, rule: StopRule) -> bool:
    """A segment's end cut it off, not the budget, and it was not asked for its result."""
    was_asked = bool((rollout.origins == Origin.GUIDANCE).any())
    return rollout.is_truncated and rollout.num_tokens < rule.max_tokens and not was_asked


def complete_ends(rollout: Rollout, rule: StopRule) -> tuple[int, ...]:
    """0 and the ends of the steps that another one follows, in tokens; () without any."""
    steps = step_spans(rollout, 0, min_chars=rule.min_chars)[:-1]
    return (0, *(step.end for step in steps)) if steps else ()


def is_stopped(preferences: Float64, *, below: float, patience: int) -> bool:
    """Whether the last `patience` steps were all not worth taking.

    0.6, 0.4, 0.3 below 0.5 with patience 2: yes; 0.4, 0.6: no; 0.4 alone: no.
    """
    last = preferences[-patience:]
    return len(last) == patience and bool((last < below).all())


def early_stop_metrics(
    groups: Sequence[RewardedGroup], state: State, *, rule: StopRule
) -> Mapping[str, float]:
    """How many answers were stopped, and how much of the token budget none of them used.

    `tokens_saved` is what a stopped answer left of its budget, an upper bound of what it would have
    written; the mean is over all answers.
    """
    rollouts = [rollout for item in groups for rollout in item.group.rollouts]
    stopped = [
        is_under_way(rollout, rule) or bool((rollout.origins == Origin.GUIDANCE).any())
        for rollout in rollouts
    ]
    left = np.array([rule.max_tokens - rollout.num_tokens for rollout in rollouts], np.float64)
    saved = left * np.array(stopped)
    return {
        "early_stop/frac_stopped": float(np.mean(stopped)),
        "early_stop/tokens_saved": float(saved.mean()),
        "early_stop/budget_saved": float(saved.mean() / rule.max_tokens),
    }


def _next_plan(group: Group, place: int, rule: StopRule) -> RolloutPlan | None:
    """What an answer gets next; None: it is done, or stopped."""
    rollout = group.rollouts[place]
    if not is_under_way(rollout, rule):
        return None
    prefix = Prefix(rollout=place, end=rollout.num_tokens)
    preferences = step_preferences(_utilities(group, place, rule), literal_order=rule.literal_order)
    if not is_stopped(preferences, below=rule.below, patience=rule.patience):
        return RolloutPlan(continues=prefix, replaces=True, max_new_tokens=rule.segment_tokens)
    if not rule.phrase or rollout.num_tokens + rule.answer_tokens > rule.max_tokens:
        return None
    return RolloutPlan(
        continues=prefix, replaces=True, suffix=rule.phrase, max_new_tokens=rule.answer_tokens
    )


def _utilities(group: Group, place: int, rule: StopRule) -> Float64:
    """Of the prefixes that end a complete step, the empty one first; NaN: not judged. [N + 1]"""
    ends = complete_ends(group.rollouts[place], rule)
    said = {
        score.span.end: score.value
        for score in group.scores
        if score.scorer == rule.scorer and score.span.rollout == place and score.span.start == 0
    }
    values = [said[end] if end in said else None for end in ends]
    return np.array([np.nan if value is None else value for value in values], np.float64)
