"""SPO-chain: what each part of an answer added, from continuations of its prefixes.

arXiv:2505.23564. Rollouts that continue another one tell what its prefix is worth and are never
trained on; the others are the answers. Refuses to know how cuts are chosen. Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.cut_points import is_certain, unlikely_cuts
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.trees import num_pieces
from grpo.types import Bool, Float64, Group


def segment_advantages(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    probability: float,
    interval: int,
) -> list[PerToken]:
    """Of each answer's tokens: value after their segment - value before it. [T]

    A certain token (probability above `probability`) has 0, and so has a continuation.
    """
    found = []
    for item in groups:
        rows = [np.zeros(rollout.num_tokens) for rollout in item.group.rollouts]
        known = continuations(item.group)
        for place in _answers(item.group):
            rollout = item.group.rollouts[place]
            cuts = unlikely_cuts(rollout, probability=probability, interval=interval)
            values = [prefix_value(item.rewards, known.get((place, end), [])) for end in cuts]
            gains = segment_gains(
                cuts, values, final=float(item.rewards[place]), length=rollout.num_tokens
            )
            rows[place] = np.where(is_certain(rollout, probability=probability), 0.0, gains)
        found.append(rows)
    return found


def segment_gains(
    cuts: Sequence[int], values: Sequence[float], *, final: float, length: int
) -> Float64:
    """V(end) - V(start) of the segment that a token is in; 0 before the first cut. [T]

    Cuts 1, 4, 7 of 8 tokens, values 0.4, 0.8, 0.5 and the reward 1: 0, 0.4 (3 times), -0.3 (3
    times), 0.5. A cut at 0 has the value of the prompt. A value that is missing: 0 on both sides.
    """
    gains = np.zeros(length)
    ends, after = [*cuts, length][1:], [*values, final][1:]
    for start, end, before, then in zip(cuts, ends, values, after, strict=True):
        gains[start:end] = then - before
    return np.nan_to_num(gains)


def prefix_value(rewards: Float64, places: Sequence[int]) -> float:
    """The mean reward of these continuations of a prefix; NaN where none was judged."""
    present = rewards[list(places)]
    present = present[~np.isnan(present)]
    return float(present.mean()) if len(present) else np.nan


def continuations(group: Group) -> Mapping[tuple[int, int], list[int]]:
    """Places of the continuations, by the answer (its place) and the end of the prefix.

    The other answers are continuations of the bare prompt.
    """
    answers = _answers(group)
    found = {(place, 0): [other for other in answers if other != place] for place in answers}
    place_of = {group.rollouts[p].lineage[0].id: p for p in answers if group.rollouts[p].lineage}
    for number, rollout in enumerate(group.rollouts):
        if num_pieces(rollout) > 1:
            origin = rollout.lineage[0]
            found.setdefault((place_of[origin.id], origin.end), []).append(number)
    return found


def answers_only(group: Group, state: State) -> list[Bool]:
    """The tokens of the answers, none of the continuations."""
    return [np.full(rollout.num_tokens, num_pieces(rollout) == 1) for rollout in group.rollouts]


def uncertain_only(group: Group, state: State, *, probability: float) -> list[Bool]:
    """Tokens that the policy could have chosen otherwise: probability up to `probability`."""
    return [~is_certain(rollout, probability=probability) for rollout in group.rollouts]


def value_metrics(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    probability: float,
    interval: int,
) -> Mapping[str, float]:
    """How many segments answers have, what their values cost, and the reward of the answers."""
    places = [_answers(item.group) for item in groups]
    cuts = [
        len(unlikely_cuts(item.group.rollouts[place], probability=probability, interval=interval))
        for item, answers in zip(groups, places, strict=True)
        for place in answers
    ]
    pairs = list(zip(groups, places, strict=True))
    rewards = np.concatenate([item.rewards[answers] for item, answers in pairs])
    present = rewards[~np.isnan(rewards)]
    more = [len(item.group.rollouts) - len(answers) for item, answers in pairs]
    found = {
        "segments/mean_cuts": float(np.mean(cuts)),
        "segments/num_continuations": float(np.mean(more)),
    }
    return found | ({"segments/reward": float(present.mean())} if len(present) else {})


def _answers(group: Group) -> list[int]:
    """Places of the rollouts that continue no other one."""
    return [place for place, rollout in enumerate(group.rollouts) if num_pieces(rollout) == 1]
