"""One full answer, then answers that leave it early (S-GRPO, arXiv:2505.07686).

An exit keeps the beginning of the full answer, gets a phrase that asks for the answer, and goes on
by itself. The exits are known by that phrase, which is given. Refuses to know how it is tokenised.
Shapes: G rollouts in a group, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.types import Bool, Float64, Group, Origin, Prefix, Rollout, RolloutPlan

Positions = Literal["random", "even"]


def full_then_exits(
    group: Group,
    state: State,
    *,
    num_generations: int,
    positions: Positions,
    seed: int,
    phrase: str,
    thinking_end: str,
    max_prefix: int,
    answer_tokens: int,
) -> tuple[RolloutPlan, ...]:
    """One full answer; then num_generations - 1 exits from it, the earliest first.

    Exits lie within the part before `thinking_end` and leave room for phrase and answer. An answer
    with fewer places than that has an exit at each.
    """
    if not group.rollouts:
        return (RolloutPlan(),)
    if len(group.rollouts) > 1:
        return ()
    (full,) = group.rollouts
    last = min(last_exit(full, thinking_end), max_prefix)
    count = num_generations - 1
    places = (
        even_places(last, count)
        if positions == "even"
        else random_places(last, count, seed=seed, group=group.id)
    )
    return tuple(
        RolloutPlan(
            continues=Prefix(rollout=0, end=place), suffix=phrase, max_new_tokens=answer_tokens
        )
        for place in places
    )


def last_exit(full: Rollout, thinking_end: str) -> int:
    """The latest place at which an answer can be left: before `thinking_end`, or its last token."""
    thinking, found, _ = full.text.partition(thinking_end)
    if not found:
        return full.num_tokens - 1
    return int(np.searchsorted(full.token_ends, len(thinking), side="right"))


def random_places(last: int, count: int, *, seed: int, group: int) -> list[int]:
    """Different places of 1..last, drawn uniformly, in order; the same for the same group."""
    generator = np.random.default_rng([seed, group])
    drawn = generator.permutation(max(last, 0))[:count] + 1
    return sorted(int(place) for place in drawn)


def even_places(last: int, count: int) -> list[int]:
    """Places that cut 1..last into count + 1 equal parts, or all of them. last 9, count 2: 3, 6."""
    if count >= last:
        return list(range(1, last + 1))
    return [round(last * (k + 1) / (count + 1)) for k in range(count)]


def exit_lengths(group: Group) -> Float64:
    """Tokens that each answer shares with the full one; its own length for the full one. [G]"""
    return np.array([_exit_length(rollout) for rollout in group.rollouts], np.float64)


def decaying_outcome(
    group: Group, state: State, *, scorer: str, weight: float, decay: float
) -> Float64:
    """Weight times the outcome, times `decay` for each right answer that left earlier. [G]

    arXiv:2505.07686: the j-th right exit gets 2^-(j-1), a wrong one nothing; the full answer comes
    last. Outcomes 0, 1, 0, 1, 1 with decay 1/2, in the order of leaving: 0, 1, 0, 0.5, 0.25.
    """
    values = outcome_values(group, scorer=scorer)
    factors = np.ones(len(values))
    num_right = 0
    for place in np.argsort(exit_lengths(group), kind="stable"):
        if values[place] > 0:
            factors[place] = decay**num_right
            num_right += 1
    return weight * values * factors


def own_part_only(group: Group, state: State) -> list[Bool]:
    """Of an exit only what follows the phrase; the full answer's tokens are trained once, in it."""
    return [
        np.arange(rollout.num_tokens) >= (length if length < rollout.num_tokens else 0)
        for rollout, length in zip(group.rollouts, exit_lengths(group), strict=True)
    ]


def exit_metrics(
    groups: Sequence[RewardedGroup], state: State, *, scorer: str
) -> Mapping[str, float]:
    """How early the answer is there. No mean of nothing.

    `first_right_share`: what the earliest right exit kept of the full answer, where one was right.
    """
    found: dict[str, list[float]] = {"outcome_full": [], "outcome_exits": [], "full_tokens": []}
    found["first_right_share"] = []
    for item in groups:
        values, lengths = outcome_values(item.group, scorer=scorer), exit_lengths(item.group)
        is_exit = [length < r.num_tokens for r, length in _pairs(item.group, lengths)]
        full = int(np.argmin(is_exit))
        found["outcome_full"].append(values[full])
        found["full_tokens"].append(lengths[full])
        found["outcome_exits"] += values[is_exit].tolist()
        right = lengths[is_exit][values[is_exit] > 0]
        if len(right):
            found["first_right_share"].append(float(right.min() / lengths[full]))
    present = {name: np.array(v, np.float64) for name, v in found.items()}
    present = {name: values[~np.isnan(values)] for name, values in present.items()}
    return {f"early_exit/{name}": float(v.mean()) for name, v in present.items() if len(v)}


def _pairs(group: Group, lengths: Float64) -> list[tuple[Rollout, float]]:
    return list(zip(group.rollouts, lengths.tolist(), strict=True))


def _exit_length(rollout: Rollout) -> int:
    given = np.flatnonzero(rollout.origins == Origin.GUIDANCE)
    return int(given[0]) if len(given) else rollout.num_tokens
