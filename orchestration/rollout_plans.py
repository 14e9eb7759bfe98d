"""What an algorithm plans, made concrete: requests for the engine, and rollouts in their places.

Knows tokens, pieces and places of one group; refuses to know engines, scorers and algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from grpo.types import (
    FinishReason,
    Float32,
    Group,
    Int32,
    Origin,
    Piece,
    Rollout,
    RolloutPlan,
    SampleRequest,
    Sampling,
)


class PlanTokenizer(Protocol):
    """What plans need of a tokenizer: text to tokens, and given tokens back to text."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """Tokens that end a completion."""
        ...

    def encode_prompt(self, prompt: str) -> Int32:
        """With the chat template, ready for the answer."""
        ...

    def encode_text(self, text: str) -> Int32:
        """Without special tokens."""
        ...

    def decode(self, tokens: Int32) -> tuple[str, Int32]:
        """The text, and the end of each token in it, in characters."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedPlan:
    """A plan with its place in the group, its context and all tokens that are given."""

    plan: RolloutPlan
    index: int
    context: Int32  # [L]
    train_context: Int32 | None  # [L]
    parent: Rollout | None  # whose prefix it continues
    given: Int32  # prefix, guidance and suffix

    @property
    def prefix_length(self) -> int:
        """Tokens that come from the parent."""
        return 0 if self.plan.continues is None else self.plan.continues.end

    @property
    def is_sampled(self) -> bool:
        """Whether the engine has anything to do."""
        return self.plan.max_new_tokens != 0

    def request(self, group: int, sampling: Sampling, seed: int) -> SampleRequest:
        """For the engine, to which everything given is guidance."""
        limit = sampling.max_tokens
        if self.plan.max_new_tokens is not None:
            limit = min(limit, len(self.given) + self.plan.max_new_tokens)
        return SampleRequest(
            group=group,
            index=self.index,
            context=self.context,
            guidance=self.given,
            sampling=replace(sampling, max_tokens=limit),
            seed=seed,
        )


def placed(
    group: Group, plans: Sequence[RolloutPlan], tokenizer: PlanTokenizer
) -> list[PlacedPlan]:
    """New rollouts follow the present ones in order; one that replaces takes its parent's place."""
    concrete: list[PlacedPlan] = []
    free = len(group.rollouts)
    for plan in plans:
        parent = _parent(group, plan)
        index = free
        if plan.replaces:
            assert plan.continues is not None
            index = plan.continues.rollout
        else:
            free += 1
        context = group.prompt.tokens if parent is None else parent.context
        train_context = None if parent is None else parent.train_context
        if plan.text is not None:
            context = tokenizer.encode_prompt(plan.text)
            train_context = group.prompt.tokens if plan.trains_on_prompt else None
        concrete.append(
            PlacedPlan(
                plan=plan,
                index=index,
                context=context,
                train_context=train_context,
                parent=parent,
                given=_given(plan, parent, tokenizer),
            )
        )
    replaced = [item.index for item in concrete if item.plan.replaces]
    if len(set(replaced)) < len(replaced):
        raise ValueError(f"plans of one wave replace rollouts {replaced}: each can be only once")
    return concrete


def without_sampling(item: PlacedPlan, tokenizer: PlanTokenizer) -> Rollout:
    """The rollout of a plan that gives all of its tokens."""
    size = len(item.given)
    text, token_ends = tokenizer.decode(item.given)
    ends = size > 0 and int(item.given[-1]) in tokenizer.stop_ids
    return Rollout(
        index=item.index,
        context=item.context,
        tokens=item.given,
        log_probs=np.zeros(size, np.float32),
        origins=np.full(size, Origin.GUIDANCE, np.uint8),
        versions=np.full(size, -1, np.int32),
        text=text,
        token_ends=token_ends,
        finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
    )


def grown(group: Group, items: Sequence[PlacedPlan], rollouts: Sequence[Rollout]) -> Group:
    """The group with the rollouts of a wave; what was said of a replaced rollout goes with it."""
    parents = {item.plan.continues.rollout for item in items if item.plan.continues is not None}
    present, next_id = _with_lineages(group.rollouts, sorted(parents))
    places: dict[int, Rollout] = dict(enumerate(present))
    for item, rollout in zip(items, rollouts, strict=True):
        finished = _with_given_streams(item, rollout)
        if item.plan.continues is not None:
            pieces = _cut(present[item.plan.continues.rollout].lineage, item.prefix_length)
            if rollout.num_tokens > item.prefix_length:
                pieces += (Piece(id=next_id, end=rollout.num_tokens),)
                next_id += 1
            finished = replace(finished, lineage=pieces)
        places[item.index] = finished
    gone = {item.index for item in items if item.plan.replaces}
    kept = tuple(score for score in group.scores if score.span.rollout not in gone)
    brought = tuple(
        replace(score, span=replace(score.span, rollout=item.index))
        for item in items
        for score in item.plan.scores
    )
    return replace(
        group,
        rollouts=tuple(places[index] for index in range(len(places))),
        scores=kept + brought,
    )


def _parent(group: Group, plan: RolloutPlan) -> Rollout | None:
    if plan.continues is None:
        return None
    place, end = plan.continues.rollout, plan.continues.end
    if not 0 <= place < len(group.rollouts):
        raise ValueError(
            f"a plan continues rollout {place}, but the group has {len(group.rollouts)}"
        )
    parent = group.rollouts[place]
    if not 0 <= end <= parent.num_tokens:
        raise ValueError(
            f"a plan continues rollout {place} after {end} tokens; it has {parent.num_tokens}"
        )
    return parent


def _given(plan: RolloutPlan, parent: Rollout | None, tokenizer: PlanTokenizer) -> Int32:
    parts = [plan.guidance]
    if parent is not None and plan.continues is not None:
        parts.insert(0, parent.tokens[: plan.continues.end])
    if plan.suffix:
        parts.append(tokenizer.encode_text(plan.suffix))
    return np.concatenate(parts).astype(np.int32)


def _with_given_streams(item: PlacedPlan, rollout: Rollout) -> Rollout:
    """The engine took all given tokens for guidance; those that a policy wrote are its own."""
    log_probs, origins = rollout.log_probs.copy(), rollout.origins.copy()
    versions, end = rollout.versions.copy(), item.prefix_length
    if item.parent is not None:
        log_probs[:end] = item.parent.log_probs[:end]
        origins[:end] = item.parent.origins[:end]
        versions[:end] = item.parent.versions[:end]
    known: Float32 | None = item.plan.guidance_log_probs
    if known is not None:
        log_probs[end : end + len(known)] = known
        origins[end : end + len(known)] = Origin.POLICY
    return replace(
        rollout,
        log_probs=log_probs,
        origins=origins,
        versions=versions,
        train_context=item.train_context,
    )


def _with_lineages(
    rollouts: Sequence[Rollout], parents: Sequence[int]
) -> tuple[list[Rollout], int]:
    """Parents that were sampled at once become one piece; and the first id that is free."""
    used = [piece.id for rollout in rollouts for piece in rollout.lineage]
    free = max(used, default=-1) + 1
    present = list(rollouts)
    for place in parents:
        if not present[place].lineage:
            piece = Piece(id=free, end=present[place].num_tokens)
            present[place] = replace(present[place], lineage=(piece,))
            free += 1
    return present, free


def _cut(lineage: Sequence[Piece], end: int) -> tuple[Piece, ...]:
    """The pieces of the first `end` tokens. 3, 7 and 9 cut at 5: 3 and 5."""
    starts = [0, *(piece.end for piece in lineage)]
    return tuple(
        replace(piece, end=min(piece.end, end))
        for start, piece in zip(starts, lineage, strict=False)
        if start < end
    )
