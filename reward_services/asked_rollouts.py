"""What a model is asked, and learns from, as whole rollouts: each distinct one is asked once.

Knows the records of grpo.types; knows no model and no tokenizer. Shapes: T tokens of a
completion, L tokens of a context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.types import Group, Int32, Score, Span
from reward_services.batches import Item, span_characters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedRollout:
    """One rollout and what is asked about it."""

    prompt: str
    text: str
    context: Int32  # [L]
    tokens: Int32  # [T]
    boundaries: tuple[int, ...]  # tokens: wherever a span begins or ends, in order, without 0
    characters: tuple[int, ...]  # of the text, at each boundary
    spans: tuple[tuple[int, int], ...]  # tokens [start, end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedRollouts:
    """The rollouts of a batch, and for each of its spans (rollout, place in its spans)."""

    rollouts: tuple[AskedRollout, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedRollout:
    """What is learned from: an answer and its outcome."""

    context: Int32  # [L]
    tokens: Int32  # [T]
    outcome: float


def span_boundaries(
    spans: Sequence[Span], scores: Sequence[Score], scorer: str
) -> Mapping[int, tuple[int, ...]]:
    """By rollout: where its spans begin and end, those that this scorer has judged included.

    A model that marks the ends of steps has to see the steps before a span as well. Steps [0, 3)
    judged before and [3, 7) asked for now: (3, 7).
    """
    found: dict[int, set[int]] = {}
    for span in (*spans, *(score.span for score in scores if score.scorer == scorer)):
        found.setdefault(span.rollout, set()).update((span.start, span.end))
    return {rollout: tuple(sorted(ends - {0})) for rollout, ends in found.items()}


def asked_rollouts(items: Sequence[Item], *, scorer: str) -> AskedRollouts:
    """Spans by rollout; rollouts of the same prompt with the same tokens and boundaries are one."""
    spans_of: dict[int, tuple[Group, list[Span]]] = {}
    for group, span in items:
        spans_of.setdefault(id(group), (group, []))[1].append(span)
    keys: dict[tuple[int, int], tuple[object, ...]] = {}
    rollouts: dict[tuple[object, ...], AskedRollout] = {}
    for group, spans in spans_of.values():
        found = span_boundaries(spans, group.scores, scorer)
        for place in dict.fromkeys(span.rollout for span in spans):
            boundaries = found[place]
            rollout = _asked(group, place, boundaries)
            key = (rollout.prompt, rollout.context.tobytes(), rollout.tokens.tobytes(), boundaries)
            keys[id(group), place] = key
            rollouts.setdefault(key, rollout)
    numbers = {key: number for number, key in enumerate(rollouts)}
    asked: list[dict[tuple[int, int], int]] = [{} for _ in rollouts]
    places = []
    for group, span in items:
        number = numbers[keys[id(group), span.rollout]]
        pair = (span.start, span.end)
        places.append((number, asked[number].setdefault(pair, len(asked[number]))))
    rows = zip(rollouts.values(), asked, strict=True)
    return AskedRollouts(
        rollouts=tuple(replace(rollout, spans=tuple(spans)) for rollout, spans in rows),
        places=tuple(places),
    )


def judged_rollouts(groups: Sequence[Group], *, outcome: str) -> list[JudgedRollout]:
    """The answers that the outcome scorer applied to, group by group."""
    return [
        JudgedRollout(context=rollout.context, tokens=rollout.tokens, outcome=value)
        for group in groups
        for rollout, value in zip(group.rollouts, group.outcomes(outcome), strict=True)
        if value is not None and rollout.num_tokens
    ]


def _asked(group: Group, place: int, boundaries: tuple[int, ...]) -> AskedRollout:
    rollout = group.rollouts[place]
    prefixes = [Span(rollout=place, start=0, end=end) for end in boundaries]
    return AskedRollout(
        prompt=group.prompt.text,
        text=rollout.text,
        context=rollout.context,
        tokens=rollout.tokens,
        boundaries=boundaries,
        characters=tuple(span_characters(rollout, prefix)[1] for prefix in prefixes),
        spans=(),
    )
