"""Which token spans of a rollout a scorer has to judge.

Refuses to know how a scorer judges them.
"""

from __future__ import annotations

from grpo.types import Rollout, Span


def whole_answer(scorer: str, rollout: Rollout) -> tuple[Span, ...]:
    """One span: the completion from its first token to its last."""
    return (Span(rollout=rollout.index, start=0, end=rollout.num_tokens),)
