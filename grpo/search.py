"""Monte-Carlo tree search over the steps of an answer, and the pairs of steps that it leaves.

arXiv:2405.00451. Every node is a rollout of the group that ends with it; its parent's rollout is
its beginning. The search keeps nothing between waves: it is played anew on the nodes that are
there and stops where it needs one that is not. Refuses to know how pairs are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo.dpo import doubt_from_visits
from grpo.pipeline import RewardedGroup, State
from grpo.rewards import CONSTANT_RANGE, outcome_values, total_outcome
from grpo.spans import not_scored_yet
from grpo.trees import identity, is_growing, last_piece_start, num_pieces, piece_ids
from grpo.types import Bool, Float64, Group, Prefix, Rollout, RolloutPlan, Span

PRIOR_LENGTH_POWER = 1.25  # of the released code: shorter steps lose less than by a mean
FREE_DEPTH = 3  # self-evaluation counts in full down to here, then over the depth beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How a search goes; the defaults of a recipe are those of `mcts_dpo.Config`."""

    num_actions: int  # children of a node
    max_step_tokens: int
    num_iterations: int  # for each step of the answer that is searched for
    root_factor: int  # times as many for the first step
    search_depth: int  # steps looked ahead
    exploration: float  # weight of the prior
    discount: float  # of the children's value in a node's (paper: gamma)
    right_value: float
    wrong_value: float
    max_tokens: int  # of a completion
    outcomes: Mapping[str, float]  # who says what is right; weights
    value_scorer: str | None  # who says how good a prefix is


@dataclass(slots=True, kw_only=True, eq=False)
class SearchNode:
    """A step of the search's tree and what the search found of it so far."""

    place: int | None  # of its rollout; None: the prompt
    parent: SearchNode | None
    depth: int
    prior: float  # how likely the policy takes this step
    value: float  # what the scorers say of it
    is_end: bool  # of an answer, or of the budget
    children: list[SearchNode] = field(default_factory=list)
    visits: int = 0
    below: float = 0.0  # V: the children's mean, by visits
    quality: float = 0.0  # Q: what the step adds, and what comes after it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Search:
    """How far the search got."""

    root: SearchNode
    chosen: tuple[SearchNode, ...]  # the steps taken, the prompt first
    wanted: SearchNode | None  # the node whose children it needs to go on; None: it is over


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPair:
    """Two steps after the same prefix, as places of rollouts."""

    better: int
    worse: int
    doubt: float  # that it is the other way round, from visits


def search_plans(
    group: Group, state: State, *, settings: SearchSettings
) -> tuple[RolloutPlan, ...]:
    """The children of the node that the search wants to look into next."""
    wanted = searched(group, settings).wanted
    if wanted is None:
        return ()
    prefix = None
    if wanted.place is not None:
        end = group.rollouts[wanted.place].num_tokens
        prefix = Prefix(rollout=wanted.place, end=end)
    plan = RolloutPlan(continues=prefix, max_new_tokens=settings.max_step_tokens)
    return (plan,) * settings.num_actions


def answers_and_nodes(
    group: Group,
    scorers: tuple[str, ...],
    *,
    value_scorer: str | None,
    max_tokens: int,
) -> Mapping[str, tuple[Span, ...]]:
    """Ended answers are judged as a whole; the value scorer judges each node as a prefix."""
    whole = [
        Span(rollout=place, start=0, end=rollout.num_tokens)
        for place, rollout in enumerate(group.rollouts)
    ]
    ended = [
        span
        for span, rollout in zip(whole, group.rollouts, strict=True)
        if not is_growing(rollout, max_tokens=max_tokens)
    ]
    return {
        name: not_scored_yet(group, name, whole if name == value_scorer else ended)
        for name in scorers
    }


def finished_answers_only(group: Group, state: State, *, max_tokens: int) -> list[Bool]:
    """All tokens of the nodes that end an answer or the budget, none of the others."""
    return [
        np.full(rollout.num_tokens, not is_growing(rollout, max_tokens=max_tokens))
        for rollout in group.rollouts
    ]


def searched(group: Group, settings: SearchSettings) -> Search:
    """Play the search on the rollouts that are there, as far as they reach.

    For each step of the answer: iterations that walk down by `puct`, look into the node they end
    at, and hand its children's values back up; then the child of the highest quality is taken.
    """
    children, values = _children(group.rollouts), node_values(group, settings)
    root = SearchNode(place=None, parent=None, depth=0, prior=1.0, value=0.0, is_end=False)
    chosen = [root]
    while not chosen[-1].is_end:
        current = chosen[-1]
        factor = settings.root_factor if current is root else 1
        for _ in range(settings.num_iterations * factor):
            path = _walk(current, settings)
            leaf = path[-1]
            if not leaf.is_end and leaf.depth - current.depth < settings.search_depth:
                _look_into(leaf, group, children, values, settings)
                if not leaf.children:
                    return Search(root=root, chosen=tuple(chosen), wanted=leaf)
            _back_up(path, settings.discount)
        chosen.append(_best(current.children))
    return Search(root=root, chosen=tuple(chosen), wanted=None)


def step_pairs(group: Group, settings: SearchSettings) -> tuple[StepPair, ...]:
    """At each step of the chosen answer the best child against the worst, if they differ."""
    pairs = []
    for node in searched(group, settings).chosen:
        if len(node.children) < 2:
            continue
        best, worst = _best(node.children), min(node.children, key=lambda n: n.quality)
        if best.quality - worst.quality > CONSTANT_RANGE:
            assert best.place is not None
            assert worst.place is not None
            doubt = doubt_from_visits(best.visits, worst.visits)
            pairs.append(StepPair(better=best.place, worse=worst.place, doubt=doubt))
    return tuple(pairs)


def node_values(group: Group, settings: SearchSettings) -> Float64:
    """What each rollout is worth as a node; 0: nothing is known of it. [G]

    The value scorer's score, over the depth beyond the third step, and what the answer is worth if
    it has ended.
    """
    depths = np.array([num_pieces(rollout) for rollout in group.rollouts], np.float64)
    values = np.zeros(len(group.rollouts))
    if settings.value_scorer is not None:
        found = outcome_values(group, scorer=settings.value_scorer)
        values += np.nan_to_num(found) / np.maximum(depths - FREE_DEPTH, 1)
    outcomes = total_outcome(group, weights=settings.outcomes)
    worth = np.where(outcomes > 0, settings.right_value, settings.wrong_value)
    values += np.where(np.isnan(outcomes), 0.0, worth)
    return values


def puct(*, quality: float, prior: float, parent_visits: int, visits: int, weight: float) -> float:
    """Q + weight * prior * sqrt(visits of the parent) / (1 + visits).

    Q 0.2, prior 0.5, visits 9 and 2, weight 1: 0.7.
    """
    return quality + weight * prior * float(np.sqrt(parent_visits)) / (1 + visits)


def step_prior(log_probs: Float64) -> float:
    """exp(sum of log-probabilities / length^1.25): -0.1, -0.3, -0.2, -0.4 make 0.8380."""
    return float(np.exp(log_probs.sum() / max(len(log_probs), 1) ** PRIOR_LENGTH_POWER))


def mean_by_visits(visits: Sequence[int], qualities: Sequence[float]) -> float:
    """V of a node from its children; one that was never visited weighs as if visited once.

    (3, 0.6), (1, -0.2), (0, 0.1): 0.34.
    """
    weights = np.maximum(np.array(visits, np.float64), 1.0)
    return float(weights @ np.array(qualities, np.float64) / weights.sum())


def search_metrics(
    groups: Sequence[RewardedGroup], state: State, *, settings: SearchSettings
) -> Mapping[str, float]:
    """How many pairs searches leave, how sure they are of them, and what the chosen answers got."""
    found = [step_pairs(item.group, settings) for item in groups]
    chosen = [searched(item.group, settings).chosen[-1].place for item in groups]
    pairs = zip(chosen, groups, strict=True)
    rewards = [float(item.rewards[place]) for place, item in pairs if place is not None]
    present = [reward for reward in rewards if not np.isnan(reward)]
    doubts = [pair.doubt for part in found for pair in part]
    means = {"search/mean_doubt": doubts, "search/chosen_reward": present}
    return {name: float(np.mean(values)) for name, values in means.items() if values} | {
        "search/num_pairs": float(np.mean([len(part) for part in found]))
    }


def _walk(start: SearchNode, settings: SearchSettings) -> list[SearchNode]:
    """Down from here by the highest PUCT, the first of equals, to a node without children."""
    path = [start]
    while path[-1].children:
        parent = path[-1]
        scores = [
            puct(
                quality=child.quality,
                prior=child.prior,
                parent_visits=parent.visits,
                visits=child.visits,
                weight=settings.exploration,
            )
            for child in parent.children
        ]
        path.append(parent.children[int(np.argmax(scores))])
    return path


def _look_into(
    node: SearchNode,
    group: Group,
    children: Mapping[tuple[int, ...], list[int]],
    values: Float64,
    settings: SearchSettings,
) -> None:
    """Give the node its children, if they have been sampled."""
    ids = () if node.place is None else piece_ids(group.rollouts[node.place])
    if node.place is not None and not ids:
        return  # nobody has continued it
    for place in children.get(ids, []):
        rollout = group.rollouts[place]
        own = rollout.log_probs[last_piece_start(rollout) :].astype(np.float64)
        value = float(values[place]) if values[place] != 0 else node.value
        node.children.append(
            SearchNode(
                place=place,
                parent=node,
                depth=node.depth + 1,
                prior=step_prior(own),
                value=value,
                is_end=not is_growing(rollout, max_tokens=settings.max_tokens),
                quality=value - node.value,
            )
        )


def _back_up(path: Sequence[SearchNode], discount: float) -> None:
    """Q = value - value of the parent + discount * V, from the leaf up."""
    for node in reversed(path):
        node.visits += 1
        if node.children:
            node.below = mean_by_visits(
                [child.visits for child in node.children],
                [child.quality for child in node.children],
            )
        gain = node.value - (0.0 if node.parent is None else node.parent.value)
        node.quality = gain + discount * node.below


def _best(nodes: Sequence[SearchNode]) -> SearchNode:
    """The highest quality; of equals the most visited, then the first."""
    return max(nodes, key=lambda node: (node.quality, node.visits))


def _children(rollouts: Sequence[Rollout]) -> dict[tuple[int, ...], list[int]]:
    """Places of the rollouts that are one step longer, by the pieces of the shorter one.

    In an order that neither a later wave nor a selection of rollouts can change.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(range(len(rollouts)), key=lambda place: identity(rollouts[place])):
        found.setdefault(piece_ids(rollouts[place])[:-1], []).append(place)
    return found
