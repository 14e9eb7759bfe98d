"""From the rewards of a tree's leaves to the credit of its tokens: TreeRL, TreePO and SPO.

A leaf without a reward (NaN) is in no value and gets no credit of its own. Leaves of equal reward
make every credit exactly 0. Refuses to know how trees are grown. Shapes: T tokens, G rollouts in a
group (leaves), N nodes of its tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from grpo.advantage import (
    centred_values,
    every_token,
    leave_one_out_values,
    standardized_values,
)
from grpo.pipeline import PerToken, Reward, RewardedGroup, State
from grpo.rewards import is_constant, total_outcome
from grpo.step_advantage import whitened_over_tokens
from grpo.trees import ROOT, Tree, identity, piece_ids, tree_of
from grpo.types import Bool, Float64, Group, Rollout

# A step value below this is that of a node that has the same leaves' worth as its parent.
NO_STEP_VALUE = 1e-8

Form = Literal["code", "paper"]
Baseline = Literal["leave_one_out", "mean", "standardized"]


def chosen_leaves(group: Group, state: State, *, keep: int, weights: Mapping[str, float]) -> Bool:
    """Which leaves TreeRL trains on: `keep` of them at random, one right one among them if any. [G]

    Drawn with the group's id as seed: asking twice, in any order, gives the same leaves.
    """
    size = len(group.rollouts)
    by_identity = sorted(range(size), key=lambda place: identity(group.rollouts[place]))
    order = np.random.default_rng(group.id).permutation(np.array(by_identity, np.int64))
    kept, rest = order[:keep], order[keep:]
    right = total_outcome(group, weights=weights) > 0
    if len(rest) and not right[kept].any() and right[rest].any():
        kept = np.append(kept[:-1], rest[right[rest]][0])
    is_kept = np.zeros(size, bool)
    is_kept[kept] = True
    return is_kept


def chosen_leaves_only(
    group: Group, state: State, *, keep: int, weights: Mapping[str, float]
) -> list[Bool]:
    """All tokens of the leaves that are trained on, none of the others."""
    is_kept = chosen_leaves(group, state, keep=keep, weights=weights)
    return [
        np.full(rollout.num_tokens, kept)
        for rollout, kept in zip(group.rollouts, is_kept, strict=True)
    ]


def state_values(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    keep: int,
    weights: Mapping[str, float],
    form: Form,
    root_of_leaves: bool,
) -> list[PerToken]:
    """TreeRL's credit of each token's node, arXiv:2506.11902. See `code_credit`, `paper_credit`."""
    credits = []
    for item in groups:
        tree = tree_of(item.group.rollouts)
        is_kept = chosen_leaves(item.group, state, keep=keep, weights=weights)
        credit = code_credit if form == "code" else paper_credit
        values = credit(tree, item.rewards, is_kept=is_kept, root_of_leaves=root_of_leaves)
        credits.append(tree.on_tokens(values))
    return credits


def code_credit(tree: Tree, rewards: Float64, *, is_kept: Bool, root_of_leaves: bool) -> Float64:
    """Step value plus state value of each node, as TreeRL's released code has them. [N]

    Leaves are worth x = reward - mean of the others; a node a = sum of x and c = number of its
    leaves. All a are centred so that they sum to 0 over tokens (a - mu c), divided by the root of
    the node's kept leaves, and v = a / c. Credit: v + (v - v of the parent); a step value of 0 is
    taken over from the parent. Root -> a (rewards 1, 0), b (1, 1), tokens 3, 2, 2, 4, 3, 3: a has
    -0.3883, b 0.5545, a's leaves 1.0199 and -1.6468.
    """
    worth, present = leave_one_out_values(rewards), ~np.isnan(rewards)
    total = np.array([worth[list(n.leaves)].sum() for n in tree.nodes], np.float64)
    count = np.array([present[list(n.leaves)].sum() for n in tree.nodes], np.float64)
    tokens = np.array([node.num_tokens for node in tree.nodes], np.float64)
    weight = float(count @ tokens)
    centre = float(total @ tokens) / weight if weight and not is_constant(rewards) else 0.0
    scaled = (total - centre * count) / _roots(tree, is_kept, root_of_leaves)
    value = scaled / np.maximum(count, 1)
    steps = np.zeros(len(value))
    for place, node in enumerate(tree.nodes[1:], start=1):
        gain = value[place] - value[node.parent]
        steps[place] = steps[node.parent] if abs(gain) < NO_STEP_VALUE else gain
    credit: Float64 = np.where(count > 0, steps + value, 0.0)
    return credit


def paper_credit(tree: Tree, rewards: Float64, *, is_kept: Bool, root_of_leaves: bool) -> Float64:
    """(V - V of the root + V - V of the parent) / root of the kept leaves below. [N]

    V is the mean reward of a node's leaves. Remembered, not read: the paper's form. Root -> a
    (rewards 1, 0), b (1, 1): a -0.3536, b 0.3536, a's leaves 0.75 and -1.25, b's 0.25.
    """
    if is_constant(rewards):
        return np.zeros(len(tree.nodes))
    value = np.array([_mean(rewards[list(node.leaves)]) for node in tree.nodes], np.float64)
    parents = np.array([node.parent for node in tree.nodes], np.int64)
    gains = (value - value[ROOT]) + (value - value[parents])
    credit: Float64 = np.nan_to_num(gains / _roots(tree, is_kept, root_of_leaves))
    return credit


def _roots(tree: Tree, is_kept: Bool, root_of_leaves: bool) -> Float64:
    """Square roots of the kept leaves of each node; 1 where they are not asked for. [N]"""
    counts = [max(int(is_kept[list(node.leaves)].sum()), 1) for node in tree.nodes]
    return np.sqrt(np.array(counts, np.float64)) if root_of_leaves else np.ones(len(counts))


def subtree_centred(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    by_size: bool,
    drop_constant: bool,
) -> list[PerToken]:
    """TreePO: a leaf against the leaves below each of its ancestors (arXiv:2508.17445). [T]

    The mean of `subtree_values`, whitened over the tokens of the step.
    """
    values = [
        subtree_values(item.group.rollouts, item.rewards, by_size=by_size, drop=drop_constant)
        for item in groups
    ]
    per_token = [every_token(i.group, row) for i, row in zip(groups, values, strict=True)]
    return whitened_over_tokens(groups, per_token)


def subtree_values(
    rollouts: Sequence[Rollout], rewards: Float64, *, by_size: bool, drop: bool
) -> Float64:
    """Mean over depths d of (reward - mean of the leaves with the same first d segments). [G]

    Depth 0 has all leaves; deeper, a leaf that is alone is passed over. by_size weighs a depth by
    the number of those leaves; drop passes over ancestors whose leaves have equal rewards. Root ->
    a (1, 0), b (1, 1): 0.375, -0.625, 0.125, 0.125; by size 1/3, -2/3, 1/6, 1/6. NaN: no reward.
    """
    sums, weights = np.zeros(len(rewards)), np.zeros(len(rewards))
    for members in _subtrees(rollouts):
        places = [place for place in members if not np.isnan(rewards[place])]
        is_useless = drop and is_constant(rewards[places])
        if (len(places) < 2 and len(members) < len(rewards)) or is_useless:
            continue
        weight = float(len(places)) if by_size else 1.0
        sums[places] += weight * centred_values(rewards[places])
        weights[places] += weight
    return np.where(np.isnan(rewards), np.nan, sums / np.maximum(weights, 1.0))


def _subtrees(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The leaves below each ancestor at each depth; an ancestor is its first d segments."""
    found: dict[tuple[int, ...], list[int]] = {(): list(range(len(rollouts)))}
    for place, rollout in enumerate(rollouts):
        ids = piece_ids(rollout)
        for depth in range(1, len(ids) + 1):
            found.setdefault(ids[:depth], []).append(place)
    return list(found.values())


def sibling_advantages(
    groups: Sequence[RewardedGroup], state: State, *, baseline: Baseline, ddof: int, eps: float
) -> list[PerToken]:
    """SPO-tree: the value of a token's edge against those beside it (arXiv:2505.23564). [T]

    A leaf is worth its reward, an inner node the mean of its children. An only child has nobody to
    be compared with: 0.
    """
    credits = []
    for item in groups:
        tree = tree_of(item.group.rollouts)
        values = node_values(tree, item.rewards)
        gains = np.zeros(len(values))
        for node in range(len(values)):
            children = list(tree.children(node))
            gains[children] = against_siblings(
                values[children], baseline=baseline, ddof=ddof, eps=eps
            )
        credits.append(tree.on_tokens(gains))
    return credits


def node_values(tree: Tree, rewards: Float64) -> Float64:
    """The reward of a leaf, the mean over the children of an inner node; NaN without any. [N]

    A rollout that ends where others go on counts as one more child.
    """
    parts: list[list[float]] = [[] for _ in tree.nodes]
    for path, reward in zip(tree.paths, rewards, strict=True):
        parts[path[-1] if path else ROOT].append(float(reward))
    values = np.full(len(tree.nodes), np.nan)
    for place in reversed(range(len(tree.nodes))):
        values[place] = _mean(np.array(parts[place], np.float64))
        parts[tree.nodes[place].parent].append(float(values[place]))
    return values


def against_siblings(values: Float64, *, baseline: Baseline, ddof: int, eps: float) -> Float64:
    """Values against the others beside them; 0 where equal or missing. [n]

    0.75, 0.25, 0, 1 against the mean of the others: 1/3, -1/3, -2/3, 2/3.
    """
    if baseline == "leave_one_out":
        return leave_one_out_values(values)
    if baseline == "mean":
        return centred_values(values)
    return standardized_values(values, ddof=ddof, eps=eps)


def edges_with_advantage(group: Group, state: State, *, rewards: tuple[Reward, ...]) -> list[Bool]:
    """SPO-tree: edges that are worth what those beside them are leave the loss and its mean. [T]

    `rewards` are those of the pipeline.
    """
    item = RewardedGroup(
        group=group, components=np.stack([term(group, state) for term in rewards], axis=1)
    )
    (gains,) = sibling_advantages([item], state, baseline="mean", ddof=0, eps=0.0)
    return [row != 0 for row in gains]


def _mean(values: Float64) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else np.nan
