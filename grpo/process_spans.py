"""Spans for scorers of single steps or single tokens of every answer.

Refuses to know what their scores are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from grpo.spans import not_scored_yet, whole_answer
from grpo.steps import step_spans
from grpo.types import Group, Rollout, Span

ProcessUnit = Literal["steps", "tokens"]


def answers_and_process(
    group: Group,
    scorers: tuple[str, ...],
    *,
    process_scorer: str,
    unit: ProcessUnit,
    min_chars: int,
) -> Mapping[str, tuple[Span, ...]]:
    """Whole answers; the process scorer judges each step or token of every answer instead."""
    parts = [
        span
        for place, rollout in enumerate(group.rollouts)
        for span in process_spans(rollout, place, unit=unit, min_chars=min_chars)
    ]
    others = tuple(name for name in scorers if name != process_scorer)
    return {
        **whole_answer(group, others),
        process_scorer: not_scored_yet(group, process_scorer, parts),
    }


def process_spans(
    rollout: Rollout, place: int, *, unit: ProcessUnit, min_chars: int
) -> tuple[Span, ...]:
    """The steps of a rollout, or its tokens one by one."""
    if unit == "steps":
        return step_spans(rollout, place, min_chars=min_chars)
    return tuple(
        Span(rollout=place, start=token, end=token + 1) for token in range(rollout.num_tokens)
    )
