"""Rollouts of a group that begin with the same tokens: the process sets of lambda-GRPO.

A process set (paper: lambda) holds the rollouts that share a prefix; with the tokens that exactly
its members share it is one node of the group's prefix tree, one process step. Counts guidance and
end-of-sequence tokens like any other; never merges rollouts of different contexts or groups.
Shapes: T tokens of one completion, G rollouts in a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo import advantage
from grpo.pipeline import Aggregation, PerToken, RewardedGroup, State
from grpo.types import Float64, Group, Rollout

Int64 = NDArray[np.int64]


def prefix_ids(rollouts: Sequence[Rollout]) -> list[Int64]:
    """A number for each token that two rollouts share iff they agree up to and including it. [T]

    Exact and linear in the number of tokens: each new pair (number of the prefix before, token)
    gets the next free number.
    """
    numbers: dict[tuple[object, int], int] = {}
    ids = []
    for rollout in rollouts:
        parent: object = rollout.context.tobytes()
        path = []
        for token in rollout.tokens.tolist():
            parent = numbers.setdefault((parent, token), len(numbers))
            path.append(parent)
        ids.append(np.array(path, np.int64))
    return ids


def set_sizes(rollouts: Sequence[Rollout]) -> list[Int64]:
    """|lambda(i, t)|: how many rollouts agree with this one up to and including token t. [T]

    ABC, ABDE, AF, GHI: [3, 2, 1], [3, 2, 1, 1], [3, 1], [1, 1, 1].
    """
    ids = prefix_ids(rollouts)
    counts = np.bincount(np.concatenate(ids))
    return [counts[path] for path in ids]


def set_means(rollouts: Sequence[Rollout], values: Sequence[Float64]) -> PerToken:
    """The mean over lambda(i, t) of a per-token value. [T]"""
    ids = prefix_ids(rollouts)
    nodes = np.concatenate(ids)
    means = np.bincount(nodes, np.concatenate(values)) / np.bincount(nodes)
    return [means[path] for path in ids]


def inverse_set_size(group: Group, state: State) -> PerToken:
    """1 / |process set|: each process step counts once, however many rollouts share it. [T]

    arXiv:2509.21154 eq. 9. As a loss weight it scales the KL term too and leaves the mean's
    denominator alone, as in the paper and its code.
    """
    return [1.0 / sizes for sizes in set_sizes(group.rollouts)]


def process_advantages(
    groups: Sequence[RewardedGroup], state: State, *, ddof: int, eps: float
) -> list[PerToken]:
    """(Mean reward of the process set - group mean) / (group deviation + eps). [T]

    The process rewards that arXiv:2509.21154 theorem 1 finds in GRPO: with a token mean and an
    unclipped ratio the loss equals that of `standardized` advantages.
    """
    outcome = advantage.standardized(groups, state, ddof=ddof, eps=eps)
    return [
        set_means(rewarded.group.rollouts, values)
        for rewarded, values in zip(groups, outcome, strict=True)
    ]


def norm_matched(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    ddof: int,
    eps: float,
    aggregation: Aggregation,
) -> list[PerToken]:
    """GRPO's advantages, each group's shrunk to the update that `inverse_set_size` makes. [T]

    A control: dividing by the size of the set also shrinks the update. The norm is that of the
    gradient if the log-probability gradients of distinct prefixes were orthonormal.
    """
    outcome = advantage.standardized(groups, state, ddof=ddof, eps=eps)
    matched = []
    for rewarded, values in zip(groups, outcome, strict=True):
        rollouts = rewarded.group.rollouts
        (means,) = aggregation([[np.ones(len(value), bool) for value in values]])
        terms = [mean * value for mean, value in zip(means, values, strict=True)]
        factor = _shrinkage(rollouts, terms)
        matched.append([factor * value for value in values])
    return matched


def tree_metrics(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    count_roots: bool,
    count_leaves: bool,
) -> Mapping[str, float]:
    """How much of a prefix tree the groups of the step really have (arXiv:2509.21154).

    Path depth: process steps on the way of a rollout. Intermediate share: share of its tokens in
    them. Flat: a group in which no rollout has one. The root (shared by all G) and the leaves (the
    rollout and its exact duplicates alone) count only on request: the paper does not say.
    """
    statistics = [
        tree_statistics(item.group.rollouts, count_roots=count_roots, count_leaves=count_leaves)
        for item in groups
    ]
    depths, shares = (np.concatenate(parts) for parts in zip(*statistics, strict=True))
    sizes = np.concatenate([s for item in groups for s in set_sizes(item.group.rollouts)])
    return {
        "process_sets/path_depth": float(depths.mean()),
        "process_sets/intermediate_share": float(shares.mean()),
        "process_sets/frac_flat": float(np.mean([not depth.any() for depth, _ in statistics])),
        "process_sets/mean_size": float(sizes.mean()) if len(sizes) else 0.0,
    }


def tree_statistics(
    rollouts: Sequence[Rollout], *, count_roots: bool = False, count_leaves: bool = False
) -> tuple[Float64, Float64]:
    """For each rollout the number of its process steps and the share of its tokens in them. [G]

    ABC, ABDE, AF, GHI: depths 2, 2, 1, 0; shares 2/3, 1/2, 1/2, 0.
    """
    copies = Counter(_identity(rollout) for rollout in rollouts)
    depths, shares = np.zeros(len(rollouts)), np.zeros(len(rollouts))
    for place, (rollout, sizes) in enumerate(zip(rollouts, set_sizes(rollouts), strict=True)):
        counted = np.ones(len(sizes), bool)
        if not count_roots:
            counted &= sizes < len(rollouts)
        if not count_leaves:
            counted &= sizes > copies[_identity(rollout)]
        if counted.any():
            depths[place] = len(np.unique(sizes[counted]))  # sets shrink: one size, one set
            shares[place] = counted.mean()
    return depths, shares


def _identity(rollout: Rollout) -> tuple[bytes, bytes]:
    return rollout.context.tobytes(), rollout.tokens.tobytes()


def _shrinkage(rollouts: Sequence[Rollout], terms: PerToken) -> float:
    """Norm of the sums over process sets of term / |lambda|, over that of the plain sums."""
    nodes, flat = np.concatenate(prefix_ids(rollouts)), np.concatenate(terms)
    sums, sizes = np.bincount(nodes, flat), np.bincount(nodes)
    plain = float(np.linalg.norm(sums))
    return float(np.linalg.norm(sums / sizes)) / plain if plain > 0 else 1.0
