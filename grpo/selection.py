"""Which scored groups are worth training on.

Selection reads the raw outcomes, never the shaped rewards: a length penalty makes the rewards of
an all-correct group differ, and the group would be kept for its lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.pipeline import State
from grpo.rewards import is_constant, outcome_values
from grpo.types import Dropped, Group


def drop_if_constant_outcome(
    group: Group, state: State, *, scorers: Sequence[str]
) -> Group | Dropped:
    """Keep a group only if some scorer tells its answers apart (DAPO, arXiv:2503.14476 eq. 11).

    For right-or-wrong outcomes this is the paper's 0 < number of right answers < G. Answers that
    a scorer does not judge (None) are left out: fewer than two judged answers are constant.
    """
    outcomes = {scorer: outcome_values(group, scorer=scorer) for scorer in scorers}
    if not all(is_constant(values) for values in outcomes.values()):
        return group
    detail = ", ".join(f"{scorer}: {values.tolist()}" for scorer, values in outcomes.items())
    return Dropped(group=group.id, prompt=group.prompt.id, reason="constant_outcome", detail=detail)
