"""How an algorithm's own state moves on after a step.

Refuses to know where the state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.pipeline import RewardedGroup, State
from grpo.types import StepReport


def unchanged(state: State, groups: Sequence[RewardedGroup], report: StepReport) -> State:
    """The algorithm remembers nothing from step to step."""
    return state
