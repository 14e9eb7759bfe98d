"""Rollouts of a group as a tree: which tokens they share, read off their lineages.

Tokens are shared if they were sampled once, not if they happen to be equal (`prefix_sets` has
those). Refuses to know scores. Shapes: T tokens of a rollout, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.pipeline import Advantage, PerToken, RewardedGroup, State, TrainedMask
from grpo.types import Bool, FinishReason, Float64, Group, Rollout

ROOT = 0  # place of the root in `Tree.nodes`


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Tokens [start, end) that exactly these rollouts share."""

    start: int
    end: int
    parent: int  # place among the nodes; the root is its own parent
    leaves: tuple[int, ...]  # places of rollouts

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """All nodes, parents before children; the root has every rollout and no token."""

    nodes: tuple[Node, ...]
    paths: tuple[tuple[int, ...], ...]  # of each rollout: its nodes from the root's child on

    def children(self, node: int) -> tuple[int, ...]:
        """Places of the nodes that go on where this one ends."""
        return tuple(
            place for place, other in enumerate(self.nodes) if place and other.parent == node
        )

    def on_tokens(self, values: Sequence[float] | Float64) -> PerToken:
        """One value per node, on each of its tokens in every rollout. G times [T]"""
        sizes = [[self.nodes[node].num_tokens for node in path] for path in self.paths]
        return [
            np.repeat(np.array([values[node] for node in path], np.float64), size)
            for path, size in zip(self.paths, sizes, strict=True)
        ]


def shared_tokens(one: Rollout, other: Rollout) -> int:
    """How many first tokens two rollouts share: up to the last piece that both have.

    (a to 5, b to 9) and (a to 3, c to 8): 3. (a to 5) and (a to 5, c to 8): 5.
    """
    shared = 0
    for mine, theirs in zip(one.lineage, other.lineage, strict=False):
        if mine.id != theirs.id:
            break
        shared = min(mine.end, theirs.end)
        if mine.end != theirs.end:
            break
    return shared


def tree_of(rollouts: Sequence[Rollout]) -> Tree:
    """The tree that the rollouts make; without any shared token a root with G leaves."""
    nodes = [Node(start=0, end=0, parent=ROOT, leaves=tuple(range(len(rollouts))))]
    paths: list[list[int]] = [[] for _ in rollouts]
    waiting = [ROOT]
    while waiting:
        parent = waiting.pop()
        for leaves, end in _parts(rollouts, nodes[parent]):
            for leaf in leaves:
                paths[leaf].append(len(nodes))
            waiting.append(len(nodes))
            nodes.append(Node(start=nodes[parent].end, end=end, parent=parent, leaves=leaves))
    return Tree(nodes=tuple(nodes), paths=tuple(map(tuple, paths)))


def _parts(rollouts: Sequence[Rollout], node: Node) -> list[tuple[tuple[int, ...], int]]:
    """The rollouts of a node by what they share beyond it, and where that ends.

    A rollout that ends with the node has nothing beyond it.
    """
    parts: list[list[int]] = []
    for place in node.leaves:
        if rollouts[place].num_tokens == node.end:
            continue
        for part in parts:  # sharing is transitive: one member stands for all
            if shared_tokens(rollouts[part[0]], rollouts[place]) > node.end:
                part.append(place)
                break
        else:
            parts.append([place])
    return [(tuple(part), _shared_end(rollouts, part)) for part in parts]


def _shared_end(rollouts: Sequence[Rollout], places: Sequence[int]) -> int:
    first, *others = (rollouts[place] for place in places)
    return min([first.num_tokens, *(shared_tokens(first, other) for other in others)])


def last_piece_start(rollout: Rollout) -> int:
    """Where the tokens begin that were sampled last."""
    return rollout.lineage[-2].end if len(rollout.lineage) > 1 else 0


def num_pieces(rollout: Rollout) -> int:
    """How many times it was sampled from."""
    return max(len(rollout.lineage), 1)


def piece_ids(rollout: Rollout) -> tuple[int, ...]:
    """Which pieces it consists of; pieces are numbered in the order in which they came to be."""
    return tuple(piece.id for piece in rollout.lineage)


def identity(rollout: Rollout) -> tuple[bytes, bytes, tuple[float, ...]]:
    """An order of rollouts that neither their places nor later waves change.

    Twins of equal tokens: those that others have continued come first, as they came to be.
    """
    pieces = piece_ids(rollout) or (float("inf"),)
    return rollout.tokens.tobytes(), rollout.log_probs.tobytes(), pieces


def is_growing(rollout: Rollout, *, max_tokens: int) -> bool:
    """Its piece was full, but neither the answer nor the budget is at its end."""
    return rollout.finish_reason is FinishReason.LENGTH and rollout.num_tokens < max_tokens


def oldest_sharer_only(
    group: Group, state: State, *, among: TrainedMask | None = None
) -> list[Bool]:
    """Each token in the row of one rollout that has it, the oldest: every edge is trained once.

    `among` (another mask) says which rollouts are trained at all; null: each of them.
    """
    masks = [np.zeros(rollout.num_tokens, bool) for rollout in group.rollouts]
    kept = [True] * len(masks) if among is None else [m.any() for m in among(group, state)]
    for node in tree_of(group.rollouts).nodes:
        leaves = [leaf for leaf in node.leaves if kept[leaf]]
        if leaves:
            oldest = min(leaves, key=lambda leaf: piece_ids(group.rollouts[leaf]))
            masks[oldest][node.start : node.end] = True
    return masks


def averaged_over_sharers(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage
) -> list[PerToken]:
    """Another advantage, each token's averaged over the rollouts that share the token.

    Trained once, a shared token then gets the credit that it would get from all of them, over
    their number.
    """
    return [
        _averaged(item.group.rollouts, values)
        for item, values in zip(groups, advantage(groups, state), strict=True)
    ]


def _averaged(rollouts: Sequence[Rollout], values: PerToken) -> PerToken:
    means = [value.copy() for value in values]
    for node in tree_of(rollouts).nodes:
        part = slice(node.start, node.end)
        if len(node.leaves) > 1 and node.num_tokens:
            shared = np.mean([values[leaf][part] for leaf in node.leaves], axis=0)
            for leaf in node.leaves:
                means[leaf][part] = shared
    return means


def shape_metrics(groups: Sequence[RewardedGroup], state: State) -> Mapping[str, float]:
    """How much of a tree the step's groups are, and what sharing saved when they were sampled."""
    trees = [tree_of(item.group.rollouts) for item in groups]
    sampled = sum(node.num_tokens for tree in trees for node in tree.nodes)
    total = sum(rollout.num_tokens for item in groups for rollout in item.group.rollouts)
    depths = [len(path) for tree in trees for path in tree.paths]
    return {
        "trees/mean_depth": float(np.mean(depths)) if depths else 0.0,
        "trees/num_leaves": float(np.mean([len(tree.paths) for tree in trees])),
        "trees/frac_tokens_shared": 1 - sampled / total if total else 0.0,
    }
