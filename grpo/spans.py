"""Which token spans each scorer has to judge, in waves: a rule sees the scores so far.

Refuses to know how a scorer judges them.
"""

from __future__ import annotations

from collections.abc import Mapping

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
