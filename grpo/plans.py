"""Which rollouts an algorithm asks for, given the group so far; () ends the group.

Refuses to know engines, seeds and sampling settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.guidance import GuidanceState, leading_tokens, num_guided
from grpo.pipeline import State
from grpo.types import Group, RolloutPlan


def independent(group: Group, state: State, *, num_generations: int) -> tuple[RolloutPlan, ...]:
    """All rollouts of the group at once, each from the plain prompt."""
    if group.rollouts:
        return ()
    return (RolloutPlan(),) * num_generations


def guided(
    group: Group,
    state: State,
    *,
    num_generations: int,
    fraction: float,
    share: float,
    end_tokens: Sequence[int],
    max_tokens: int,
) -> tuple[RolloutPlan, ...]:
    """All at once; the first floor(fraction * G) continue the beginning of the known solution.

    G2RPO-A (arXiv:2508.13023). A prompt without a solution has no guided rollout.
    """
    if group.rollouts:
        return ()
    assert isinstance(state, GuidanceState)
    guidance = leading_tokens(
        group.prompt.solution_tokens,
        length=state.length,
        share=share,
        end_tokens=end_tokens,
        max_tokens=max_tokens,
    )
    count = num_guided(fraction, num_generations) if len(guidance) else 0
    guided_plans = (RolloutPlan(guidance=guidance),) * count
    return guided_plans + (RolloutPlan(),) * (num_generations - count)
