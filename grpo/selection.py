"""Which scored groups are worth training on.

Selection reads the raw outcomes, never the shaped rewards: a length penalty makes the rewards of
an all-correct group differ, and the group would be kept for its lengths alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.pipeline import State
from grpo.rewards import is_constant, outcome_values, total_outcome
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


def drop_if_small_margin(
    group: Group, state: State, *, weights: Mapping[str, float], margin: float
) -> Group | Dropped:
    """Keep a group only if its best answer beats its worst by more than the margin.

    The filter of preference pairs of arXiv:2404.14367, for a group: the outcome is the weighted sum
    of the raw ones. Outcomes 1, 0.8 and 1, 0.2 and 0.5, 0.5, margin 0.5: only the second is kept.
    Fewer than two judged answers have no margin.
    """
    outcomes = total_outcome(group, weights=weights)
    present = outcomes[~np.isnan(outcomes)]
    found = float(present.max() - present.min()) if len(present) > 1 else 0.0
    if found > margin:
        return group
    detail = f"best - worst outcome is {found:g}, not above {margin:g}: {outcomes.tolist()}"
    return Dropped(group=group.id, prompt=group.prompt.id, reason="small_margin", detail=detail)


def drop_unless_accuracy_within(
    group: Group, state: State, *, scorer: str, low: float, high: float
) -> Group | Dropped:
    """Keep a group whose mean outcome lies in low..high, bounds included (PRIME, arXiv:2502.01456).

    Means 0, 0.25, 0.5, 0.75, 1 with 0.2 and 0.8: the middle three stay. Unjudged answers are left
    out; a group without a judged one goes.
    """
    values = outcome_values(group, scorer=scorer)
    present = values[~np.isnan(values)]
    accuracy = float(present.mean()) if len(present) else np.nan
    if low <= accuracy <= high:
        return group
    return Dropped(
        group=group.id,
        prompt=group.prompt.id,
        reason="accuracy_out_of_range",
        detail=f"{scorer}: {accuracy:g}, kept within {low:g} and {high:g}",
    )
