"""Which rollouts an algorithm asks for, given the group so far; () ends the group.

Refuses to know engines, seeds and sampling settings.
"""

from __future__ import annotations

from grpo.pipeline import State
from grpo.types import Group, RolloutPlan


def independent(group: Group, state: State, *, num_generations: int) -> tuple[RolloutPlan, ...]:
    """All rollouts of the group at once, each from the plain prompt."""
    if group.rollouts:
        return ()
    return (RolloutPlan(),) * num_generations
