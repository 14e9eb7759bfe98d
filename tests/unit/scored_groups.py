"""Groups for scorers: one character is one token, so spans can be written down by eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.types import FinishReason, Group, Origin, Prompt, Rollout, Span


def written_group(
    texts: Sequence[str],
    *,
    reference: str | None = "12",
    group: int = 0,
    columns: Mapping[str, object] | None = None,
) -> Group:
    """A group whose rollouts have these texts."""
    prompt = Prompt(
        id=f"test:{group}",
        text="7 +5",
        tokens=np.array([1, 2], np.int32),
        reference=reference,
        columns={"prompt": "7 +5"} if columns is None else columns,
    )
    rollouts = tuple(_rollout(i, text) for i, text in enumerate(texts))
    return Group(id=group, prompt=prompt, rollouts=rollouts)


def whole(group: Group) -> list[Span]:
    """The span of every whole answer."""
    return [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]


def _rollout(index: int, text: str) -> Rollout:
    size = len(text)
    return Rollout(
        index=index,
        context=np.array([1, 2], np.int32),
        tokens=np.array([ord(c) for c in text], np.int32),
        log_probs=np.zeros(size, np.float32),
        origins=np.full(size, Origin.POLICY, np.uint8),
        versions=np.zeros(size, np.int32),
        text=text,
        token_ends=np.arange(1, size + 1, dtype=np.int32),
        finish_reason=FinishReason.STOP,
    )
