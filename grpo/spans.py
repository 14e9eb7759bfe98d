"""Which token spans each scorer has to judge, in waves: a rule sees the scores so far.

Refuses to know how a scorer judges them.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpo.first_errors import Scope, places_to_judge
from grpo.steps import step_spans
from grpo.types import Group, Span


def whole_answer(group: Group, scorers: tuple[str, ...]) -> Mapping[str, tuple[Span, ...]]:
    """Every scorer judges every completion from its first token to its last, once."""
    if group.scores:
        return {}
    spans = tuple(
        Span(rollout=place, start=0, end=rollout.num_tokens)
        for place, rollout in enumerate(group.rollouts)
    )
    return dict.fromkeys(scorers, spans)


def answers_and_prefixes(
    group: Group, scorers: tuple[str, ...], *, prefix_scorer: str, min_chars: int
) -> Mapping[str, tuple[Span, ...]]:
    """Whole answers; the prefix scorer judges [0, 0) and what is there after each step instead.

    An answer of three steps has four prefixes, one without any step none.
    """
    if group.scores:
        return {}
    prefixes: list[Span] = []
    for place, rollout in enumerate(group.rollouts):
        steps = step_spans(rollout, place, min_chars=min_chars)
        ends = [0, *(step.end for step in steps)] if steps else []
        prefixes += [Span(rollout=place, start=0, end=end) for end in ends]
    others = tuple(name for name in scorers if name != prefix_scorer)
    return {**whole_answer(group, others), prefix_scorer: tuple(prefixes)}


def outcome_then_steps(
    group: Group,
    scorers: tuple[str, ...],
    *,
    task_scorer: str,
    step_scorer: str,
    scope: Scope,
    min_chars: int,
) -> Mapping[str, tuple[Span, ...]]:
    """Whole answers first; then the step scorer judges each step of the wrong answers in scope."""
    if not group.scores:
        return whole_answer(group, tuple(name for name in scorers if name != step_scorer))
    if any(score.scorer == step_scorer for score in group.scores):
        return {}
    places = places_to_judge(group, scorer=task_scorer, scope=scope)
    return {
        step_scorer: tuple(
            span
            for place in places
            for span in step_spans(group.rollouts[place], place, min_chars=min_chars)
        )
    }
