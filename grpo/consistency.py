"""GRPO-CARE's bonus: answers that the reference finds likely after the policy's own reasoning.

Reads the reference's log-probabilities from `rollout.measured["reference"]`. Refuses to know how
the reference follows the policy. Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.pipeline import RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.types import Bool, Float64, Group, Origin, Rollout

MIN_ACCURACY = 0.1  # of the released code: an answer must earn more than this to be accurate


def consistency_bonus(
    group: Group,
    state: State,
    *,
    scorer: str,
    coefficient: float,
    cap: float,
    margin: float,
    opening: str,
    closing: str | None,
) -> Float64:
    """coefficient * accuracy for accurate answers that are likely, else 0 (arXiv:2506.16141). [G]

    Accurate: above 0.1 and at least the group's mean. Likely: a likelihood, not above `cap`, of at
    least the accurate ones' mean - margin. Accuracy 1, 1, 0, 1, likelihood 0.99, 0.7, 0.98, 0.8,
    cap 0.95, coefficient 0.5: 0.5, 0, 0, 0. Departure: an answer without its markers is not likely
    (the released code gives it the likelihood 1). NaN where the scorer does not apply.
    """
    accuracy = outcome_values(group, scorer=scorer)
    likelihood = np.minimum(likelihoods(group, opening=opening, closing=closing), cap)
    return coefficient * rewarded_accuracy(accuracy, likelihood, margin=margin)


def rewarded_accuracy(accuracy: Float64, likelihood: Float64, *, margin: float) -> Float64:
    """The accuracy of accurate and likely answers, 0 for others, NaN where it is missing. [G]"""
    none = np.where(np.isnan(accuracy), np.nan, 0.0)
    if np.isnan(accuracy).all():
        return none
    is_accurate = (accuracy > MIN_ACCURACY) & (accuracy >= np.nanmean(accuracy))
    compared = likelihood[is_accurate & ~np.isnan(likelihood)]
    if not len(compared):
        return none
    is_likely = likelihood >= compared.mean() - margin  # False where NaN
    return np.where(is_accurate & is_likely, accuracy, none)


def likelihoods(group: Group, *, opening: str, closing: str | None) -> Float64:
    """Geometric mean of the reference's probabilities of the answer's tokens; NaN without any. [G]

    Log-probabilities -0.1, -0.3: 0.8187.
    """
    values = []
    for rollout in group.rollouts:
        inside = answer_tokens(rollout, opening=opening, closing=closing)
        log_probs = rollout.measured["reference"][inside].astype(np.float64)
        values.append(float(np.exp(log_probs.mean())) if len(log_probs) else np.nan)
    return np.array(values, np.float64)


def answer_tokens(rollout: Rollout, *, opening: str, closing: str | None) -> Bool:
    """Which tokens the policy wrote between the last `opening` and the `closing` after it. [T]

    Without `closing`, or where it does not follow, up to the end of the text. A token counts if all
    of its characters lie inside and it has any.
    """
    before = rollout.text.rfind(opening)
    if before < 0:
        return np.zeros(rollout.num_tokens, bool)
    start = before + len(opening)
    found = -1 if closing is None else rollout.text.find(closing, start)
    stop = len(rollout.text) if found < 0 else found
    ends = rollout.token_ends
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    is_inside = (begins >= start) & (ends <= stop) & (ends > begins)
    chosen: Bool = is_inside & (rollout.origins == Origin.POLICY)
    return chosen


def consistency_metrics(
    groups: Sequence[RewardedGroup], state: State, *, opening: str, closing: str | None
) -> Mapping[str, float]:
    """Mean likelihood of the answers that have their markers, and the share of those that do."""
    found = np.concatenate(
        [likelihoods(item.group, opening=opening, closing=closing) for item in groups]
    )
    present = found[~np.isnan(found)]
    marked = {"consistency/frac_marked": len(present) / len(found)}
    return marked | ({"consistency/likelihood": float(present.mean())} if len(present) else {})
