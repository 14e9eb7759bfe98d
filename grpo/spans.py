"""Which token spans each scorer has to judge, in waves: a rule sees the scores so far.

Refuses to know how a scorer judges them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo.first_errors import Scope, places_to_judge
from grpo.steps import step_spans
from grpo.types import Group, Span


def whole_answer(group: Group, scorers: tuple[str, ...]) -> Mapping[str, tuple[Span, ...]]:
    """Every scorer judges every completion from its first token to its last, once."""
    whole = [
        Span(rollout=place, start=0, end=rollout.num_tokens)
        for place, rollout in enumerate(group.rollouts)
    ]
    return {scorer: not_scored_yet(group, scorer, whole) for scorer in scorers}


def answers_and_prefixes(
    group: Group, scorers: tuple[str, ...], *, prefix_scorer: str, min_chars: int
) -> Mapping[str, tuple[Span, ...]]:
    """Whole answers; the prefix scorer judges [0, 0) and what is there after each step instead.

    An answer of three steps has four prefixes, one without any step none.
    """
    prefixes: list[Span] = []
    for place, rollout in enumerate(group.rollouts):
        steps = step_spans(rollout, place, min_chars=min_chars)
        ends = [0, *(step.end for step in steps)] if steps else []
        prefixes += [Span(rollout=place, start=0, end=end) for end in ends]
    others = tuple(name for name in scorers if name != prefix_scorer)
    return {
        **whole_answer(group, others),
        prefix_scorer: not_scored_yet(group, prefix_scorer, prefixes),
    }


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
    answers = whole_answer(group, tuple(name for name in scorers if name != step_scorer))
    if answers[task_scorer]:
        return answers
    places = places_to_judge(group, scorer=task_scorer, scope=scope)
    steps = [
        span
        for place in places
        for span in step_spans(group.rollouts[place], place, min_chars=min_chars)
    ]
    return {**answers, step_scorer: not_scored_yet(group, step_scorer, steps)}


def not_scored_yet(group: Group, scorer: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Those of the spans that this scorer has said nothing of; a failure is an answer, too."""
    scored = {score.span for score in group.scores if score.scorer == scorer}
    return tuple(span for span in spans if span not in scored)
