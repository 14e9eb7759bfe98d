"""Training on some of the rollouts of a group: which ones, and the group that they make.

Which rollouts are kept is decided on the raw outcomes. A subset is a group of its own: whatever
comes after it, statistics included, sees only the rollouts kept. Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from grpo.advantage import every_token, standardized_values
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import total_outcome
from grpo.types import Dropped, Float64, Group

# (rewards [G], lengths [G], how many) -> places kept, in order; never one without a reward
Choose = Callable[[Float64, Float64, int], tuple[int, ...]]
Keep = Callable[[Float64, State], int]  # rewards [G] -> how many rollouts of the group to keep


def subset(group: Group, places: Sequence[int]) -> Group:
    """The rollouts at these places, in this order, numbered anew together with their scores."""
    new_place = {old: new for new, old in enumerate(places)}
    return replace(
        group,
        rollouts=tuple(replace(group.rollouts[old], index=new) for old, new in new_place.items()),
        scores=tuple(
            replace(score, span=replace(score.span, rollout=new_place[score.span.rollout]))
            for score in group.scores
            if score.span.rollout in new_place
        ),
    )


def keep_chosen(
    group: Group, state: State, *, choose: Choose, weights: Mapping[str, float], keep: Keep
) -> Group | Dropped:
    """Keep the rollouts that `choose` chooses by their raw outcomes; drop a group without any."""
    rewards = total_outcome(group, weights=weights)
    return _kept(group, choose(rewards, _lengths(group), keep(rewards, state)), rewards)


def keep_positive(group: Group, state: State, *, weights: Mapping[str, float]) -> Group | Dropped:
    """Keep the rollouts whose raw outcome is above 0; drop a group without any."""
    rewards = total_outcome(group, weights=weights)
    return _kept(group, tuple(int(place) for place in np.flatnonzero(rewards > 0)), rewards)


def standardized_among_chosen(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    choose: Choose,
    keep: Keep,
    ddof: int,
    eps: float,
) -> list[PerToken]:
    """Standardised among the rollouts that `choose` chooses; 0 on the others, which stay in means.

    GFPO (arXiv:2508.09726). Rewards 0, 1, 1, 0, 1, 0 of which places 0, 1, 3, 4 are kept, ddof 0:
    -1, 1, 0, -1, 1, 0.
    """
    advantages = []
    for item in groups:
        count = keep(item.rewards, state)
        places = list(choose(item.rewards, _lengths(item.group), count))
        values = np.zeros(len(item.rewards))
        values[places] = standardized_values(item.rewards[places], ddof=ddof, eps=eps)
        advantages.append(every_token(item.group, values))
    return advantages


def most_varied(rewards: Float64, lengths: Float64, keep: int) -> tuple[int, ...]:
    """PODS: the `keep` rewards of the largest variance (arXiv:2504.13818).

    They are always the k largest and the keep - k smallest for some k. Rewards 0.1, 0.9, 0.4,
    0.5, 1, 0, 0.45, 0.95 and keep 4: 0, 0.1, 0.95 and 1, at places 0, 4, 5, 7.
    """
    present = np.flatnonzero(~np.isnan(rewards))
    order = present[np.argsort(rewards[present], kind="stable")]
    keep = min(keep, len(order))
    if keep == 0:
        return ()
    candidates = [
        np.concatenate([order[: keep - num_high], order[len(order) - num_high :]])
        for num_high in range(keep + 1)
    ]
    best = max(candidates, key=lambda chosen: float(rewards[chosen].var()))
    return tuple(sorted(int(place) for place in best))


def shortest(rewards: Float64, lengths: Float64, keep: int) -> tuple[int, ...]:
    """GFPO: the `keep` shortest answers; of equally long ones the first."""
    return _smallest(lengths, rewards, keep)


def most_rewarded_per_token(rewards: Float64, lengths: Float64, keep: int) -> tuple[int, ...]:
    """GFPO's token efficiency: the `keep` answers with the most reward per token."""
    return _smallest(-rewards / np.maximum(lengths, 1), rewards, keep)


def _smallest(values: Float64, rewards: Float64, keep: int) -> tuple[int, ...]:
    order = [int(place) for place in np.argsort(values, kind="stable")]
    return tuple(sorted([place for place in order if not np.isnan(rewards[place])][:keep]))


def _kept(group: Group, places: tuple[int, ...], rewards: Float64) -> Group | Dropped:
    if places:
        return subset(group, places)
    return Dropped(
        group=group.id,
        prompt=group.prompt.id,
        reason="no_rollout_kept",
        detail=f"rewards: {rewards.tolist()}",
    )


def _lengths(group: Group) -> Float64:
    return np.array([rollout.num_tokens for rollout in group.rollouts], np.float64)
