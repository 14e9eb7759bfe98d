"""How trees of rollouts grow, wave by wave: segments that branch, and forks of whole answers.

A wave is planned from the group as it stands; nothing else is remembered. Rollouts of a wave that
continue the same rollout mean it as it was before the wave, replaced or not. Refuses to know
scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.cut_points import surprising_places, unlikely_cuts
from grpo.pipeline import State
from grpo.trees import is_growing, last_piece_start, num_pieces
from grpo.types import Group, Prefix, Rollout, RolloutPlan


def uniform_tree(
    group: Group,
    state: State,
    *,
    num_children: int,
    num_levels: int,
    segment_tokens: int,
    max_tokens: int,
) -> tuple[RolloutPlan, ...]:
    """SPO-tree: every unfinished node has the same number of children; the last level ends.

    6 children and 3 levels: 6, 36, 216 rollouts, fewer where answers end early.
    """
    last = num_levels == 1
    if not group.rollouts:
        return (RolloutPlan(max_new_tokens=None if last else segment_tokens),) * num_children
    depth = max(num_pieces(rollout) for rollout in group.rollouts)
    if depth == num_levels:
        return ()
    budget = None if depth == num_levels - 1 else segment_tokens
    return tuple(
        plan
        for place in _growing(group.rollouts, max_tokens)
        for plan in _children(group.rollouts, place, num_children, budget)
    )


def segment_tree(
    group: Group,
    state: State,
    *,
    num_leaves: int,
    num_roots: int,
    num_children: int,
    segment_tokens: int,
    max_tokens: int,
) -> tuple[RolloutPlan, ...]:
    """TreePO: every unfinished segment goes on, in up to num_children ways while there is room.

    arXiv:2508.17445. Room for leaves is handed out in turn. If all answers have ended before there
    are num_leaves, further ones branch off where the last segments of the first answers began.
    """
    rollouts = group.rollouts
    if not rollouts:
        return (RolloutPlan(max_new_tokens=segment_tokens),) * min(num_roots, num_leaves)
    room = num_leaves - len(rollouts)
    growing = _growing(rollouts, max_tokens)
    if growing:
        extra = _in_turn(room, len(growing), most=num_children - 1)
        return tuple(
            plan
            for place, more in zip(growing, extra, strict=True)
            for plan in _children(rollouts, place, 1 + more, segment_tokens)
        )
    return tuple(
        _branch(last_piece_start(rollouts[number % len(rollouts)]), number % len(rollouts))
        if last_piece_start(rollouts[number % len(rollouts)])
        else RolloutPlan()
        for number in range(room)
    )


def surprise_forks(
    group: Group,
    state: State,
    *,
    num_chains: int,
    num_rounds: int,
    num_forks: int,
    num_continuations: int,
) -> tuple[RolloutPlan, ...]:
    """TreeRL's EPTree: answers, then continuations from their most surprising tokens, by rounds.

    arXiv:2506.11902. Each round forks the tree of each answer at num_forks tokens,
    num_continuations times each. That makes chains * (1 + rounds * forks * continuations) leaves:
    6 * (1 + 1 * 2 * 2) = 30.
    """
    if not group.rollouts:
        return (RolloutPlan(),) * num_chains
    seen = num_chains
    for _ in range(num_rounds):
        # What a past round asked for follows from the rollouts that it saw.
        wave = _forks(group.rollouts[:seen], num_chains, num_forks, num_continuations)
        if seen == len(group.rollouts):
            return wave
        seen += len(wave)
    return ()


def value_continuations(
    group: Group,
    state: State,
    *,
    num_chains: int,
    num_continuations: int,
    probability: float,
    interval: int,
) -> tuple[RolloutPlan, ...]:
    """SPO-chain: answers, then continuations from their cuts, which tell what a prefix is worth.

    arXiv:2505.23564. What the bare prompt is worth, the other answers tell.
    """
    if not group.rollouts:
        return (RolloutPlan(),) * num_chains
    if len(group.rollouts) > num_chains:
        return ()
    cuts = [
        unlikely_cuts(rollout, probability=probability, interval=interval)
        for rollout in group.rollouts
    ]
    return tuple(
        _branch(end, place)
        for place, ends in enumerate(cuts)
        for end in ends
        if end
        for _ in range(num_continuations)
    )


def _branch(
    end: int, place: int, *, replaces: bool = False, tokens: int | None = None
) -> RolloutPlan:
    prefix = Prefix(rollout=place, end=end)
    return RolloutPlan(continues=prefix, replaces=replaces, max_new_tokens=tokens)


def _children(
    rollouts: Sequence[Rollout], place: int, num: int, tokens: int | None
) -> tuple[RolloutPlan, ...]:
    """The rollout goes on in `num` ways; the first takes its place."""
    end = rollouts[place].num_tokens
    return tuple(_branch(end, place, replaces=number == 0, tokens=tokens) for number in range(num))


def _growing(rollouts: Sequence[Rollout], max_tokens: int) -> list[int]:
    return [place for place, item in enumerate(rollouts) if is_growing(item, max_tokens=max_tokens)]


def _in_turn(room: int, num: int, *, most: int) -> list[int]:
    """Hand out `room` things in turn, at most `most` to each: 3 to 2 takers is 2, 1."""
    whole, rest = divmod(min(room, num * most), num)
    return [whole + (place < rest) for place in range(num)]


def _forks(
    rollouts: Sequence[Rollout], num_chains: int, num_forks: int, num_continuations: int
) -> tuple[RolloutPlan, ...]:
    trees: list[list[int]] = [[place] for place in range(num_chains)]
    chain_of = {
        rollout.lineage[0].id: place
        for place, rollout in enumerate(rollouts[:num_chains])
        if rollout.lineage
    }
    for place, rollout in enumerate(rollouts[num_chains:], start=num_chains):
        trees[chain_of[rollout.lineage[0].id]].append(place)
    return tuple(
        RolloutPlan(continues=prefix)
        for places in trees
        for prefix in surprising_places(rollouts, places, num=num_forks)
        for _ in range(num_continuations)
    )
