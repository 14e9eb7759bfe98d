"""Guidance: the first tokens of a known solution, given to some rollouts of a group.

Holds the length's memory, the cut and the metrics. Refuses to know who samples and how the given
tokens are trained. Shapes: G rollouts in a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.types import Bool, Float64, Group, Int32, Origin

ROUND_OFF = 1e-9  # 1/6 of 12 rollouts is 2, whatever the product of the floats is


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceState:
    """How long guidance is now, and what the rule that changes it remembers."""

    length: float  # tokens; rounded when guidance is cut
    recent: tuple[float, ...] = ()  # mean outcomes of the steps before, the oldest first
    num_steps: int = 0  # optimiser steps made


def num_guided(fraction: float, num_generations: int) -> int:
    """floor(fraction * G), at least 1 if any are wanted: (1/4, 10) -> 2, (1/6, 4) -> 1."""
    if fraction == 0:
        return 0
    return max(math.floor(fraction * num_generations + ROUND_OFF), 1)


def leading_tokens(
    solution: Int32, *, length: float, share: float, end_tokens: Sequence[int], max_tokens: int
) -> Int32:
    """At most `length` first tokens of a solution, and never so many that they tell the answer.

    Counted up to the first of `end_tokens` (end of the reasoning part, end of sequence), at most
    floor(share * what is left) are given. 10 tokens, length 50, share 0.9: 9.
    """
    ends = np.flatnonzero(np.isin(solution, np.array(end_tokens, np.int32)))
    reasoning = int(ends[0]) if len(ends) else len(solution)
    cap = math.floor(share * reasoning + ROUND_OFF)
    return solution[: max(min(round(length), cap, max_tokens), 0)]


def guidance_metrics(
    groups: Sequence[RewardedGroup], state: State, *, scorer: str
) -> Mapping[str, float]:
    """How long guidance was, and how guided and other answers fared. No mean of nothing.

    `frac_separating`: groups with all guided answers right and all others wrong, where the
    advantage pays for being guided and for nothing else.
    """
    assert isinstance(state, GuidanceState)
    counts = [_guidance_counts(item.group) for item in groups]
    outcomes = [outcome_values(item.group, scorer=scorer) for item in groups]
    flat, values = np.concatenate(counts), np.concatenate(outcomes)
    guided = flat > 0
    means = {
        "tokens": flat[guided],
        "outcome_guided": values[guided & ~np.isnan(values)],
        "outcome_unguided": values[~guided & ~np.isnan(values)],
    }
    separating = [_is_separating(c > 0, v) for c, v in zip(counts, outcomes, strict=True)]
    return {f"guidance/{name}": float(part.mean()) for name, part in means.items() if len(part)} | {
        "guidance/length": state.length,
        "guidance/frac_guided": float(guided.mean()),
        "guidance/frac_separating": float(np.mean(separating)),
    }


def _guidance_counts(group: Group) -> Float64:
    """How many tokens of each rollout were given. [G]"""
    counts = [int((rollout.origins == Origin.GUIDANCE).sum()) for rollout in group.rollouts]
    return np.array(counts, np.float64)


def _is_separating(guided: Bool, values: Float64) -> bool:
    right = values > 0
    has_both = bool(guided.any() and (~guided).any())
    return has_both and bool(right[guided].all()) and not right[~guided].any()
