"""How an algorithm's own state moves on after a step.

Refuses to know where the state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from grpo.guidance import GuidanceState
from grpo.pipeline import RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.types import StepReport

Direction = Literal["average_over_current", "current_over_average"]
OnZero = Literal["keep", "grow"]

CYCLE = 3  # steps: two are remembered, the third moves the length
ZERO_GROWTH = 1.5  # guidance grows by this after a step without a right answer


def unchanged(state: State, groups: Sequence[RewardedGroup], report: StepReport) -> State:
    """The algorithm remembers nothing from step to step."""
    return state


def guidance_cycle(
    state: State,
    groups: Sequence[RewardedGroup],
    report: StepReport,
    *,
    scorer: str,
    max_length: int,
    direction: Direction,
    on_zero: OnZero,
) -> State:
    """G2RPO-A as released: every third step the length is scaled by (mean of two) / (this one).

    arXiv:2508.13023. Cycles do not overlap; the length stays in 1..max_length and is cut to an
    integer. Length 1000, outcomes 0.1, 0.2, 0.3: 1000 * 0.15 / 0.3 = 500.
    """
    assert isinstance(state, GuidanceState)
    current = _mean_outcome(groups, scorer)
    if current is None:
        return state
    step = state.num_steps + 1
    if step % CYCLE:
        return replace(state, recent=(*state.recent, current), num_steps=step)
    scaled = _scaled(state, current, max_length, direction, on_zero)
    return GuidanceState(length=float(int(scaled)), recent=(), num_steps=step)


def guidance_window(
    state: State,
    groups: Sequence[RewardedGroup],
    report: StepReport,
    *,
    scorer: str,
    max_length: int,
    history: int,
    direction: Direction,
    on_zero: OnZero,
) -> State:
    """The length is scaled every step by (mean outcome of the last `history` steps) / (this one).

    arXiv:2508.13023, the rule in words; the first step only remembers. Length 1000, history 2,
    outcomes 0.2, 0.25, 0.25: 1000, 800, 720.
    """
    assert isinstance(state, GuidanceState)
    current = _mean_outcome(groups, scorer)
    if current is None:
        return state
    return GuidanceState(
        length=_scaled(state, current, max_length, direction, on_zero),
        recent=(*state.recent, current)[-history:],
        num_steps=state.num_steps + 1,
    )


def guidance_decay(
    state: State,
    groups: Sequence[RewardedGroup],
    report: StepReport,
    *,
    initial_length: int,
    num_steps: int,
) -> State:
    """A line from initial_length in the first step to 0 in step num_steps, then 0.

    The baseline in the code of arXiv:2508.13023. 3072 over 7 steps: 3072, 2560, 2048, ..., 0.
    """
    assert isinstance(state, GuidanceState)
    made = state.num_steps + 1
    length = int(initial_length - made / (num_steps - 1) * initial_length)
    return replace(state, length=float(max(length, 0)), num_steps=made)


def _scaled(
    state: GuidanceState,
    current: float,
    max_length: int,
    direction: Direction,
    on_zero: OnZero,
) -> float:
    """Longer after a step that is worse than the recent ones, shorter after a better one.

    Without a right answer now or before there is no ratio.
    """
    average = float(np.mean(state.recent)) if state.recent else 0.0
    if current > 0 and average > 0:
        is_average_first = direction == "average_over_current"
        factor = average / current if is_average_first else current / average
    else:
        factor = ZERO_GROWTH if current <= 0 and on_zero == "grow" else 1.0
    return min(max(state.length * factor, 1.0), float(max_length))


def _mean_outcome(groups: Sequence[RewardedGroup], scorer: str) -> float | None:
    """Over all rollouts, guided and not; None: nothing was judged."""
    values = np.concatenate([outcome_values(item.group, scorer=scorer) for item in groups])
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None
