"""The minority of tokens at which the policy is least sure, by `rollout.measured["entropy"]`.

Both rules look at the tokens of one group that other masks leave in: what is selected cannot depend
on how rows are packed. Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from grpo.pipeline import PerToken, State, TrainedMask
from grpo.types import Bool, Float64, Group

Rule = Literal["count", "quantile"]


def high_entropy_tokens(
    group: Group, state: State, *, share: float, rule: Rule, among: Sequence[TrainedMask]
) -> list[Bool]:
    """The `share` of the group's tokens of highest entropy, of those that `among` leaves in.

    rule count: exactly max(1, ceil(share * n)) of n tokens, of equal ones the first, as in the code
    of arXiv:2506.01939 (there of a micro-batch); rule quantile: all that reach the (1 - share)
    quantile, as in TRL. Entropies 0.1, 2, 0.3, 0.05, 1.2, 0.6, 0.02, 0.9, 0.4, 0.7, share 0.2: the
    second and the fifth.
    """
    masks = [np.ones(rollout.num_tokens, bool) for rollout in group.rollouts]
    for mask_of in among:
        masks = [a & b for a, b in zip(masks, mask_of(group, state), strict=True)]
    values = [rollout.measured["entropy"].astype(np.float64) for rollout in group.rollouts]
    counted = np.concatenate([np.zeros(0), *(v[m] for v, m in zip(values, masks, strict=True))])
    kept = _RULES[rule](counted, share)
    parts = np.split(kept, np.cumsum([int(mask.sum()) for mask in masks])[:-1])
    for mask, part in zip(masks, parts, strict=True):
        mask[mask] = part
    return masks


def high_entropy_weight(
    group: Group, state: State, *, share: float, rule: Rule, among: Sequence[TrainedMask]
) -> PerToken:
    """1 on `high_entropy_tokens`, 0 on the others: those stay in the mean and keep penalties."""
    masks = high_entropy_tokens(group, state, share=share, rule=rule, among=among)
    return [mask.astype(np.float64) for mask in masks]


def _largest(values: Float64, share: float) -> Bool:
    kept = np.zeros(len(values), bool)
    if len(values):
        # Rounded before it is rounded up: 0.2 * 15 is a little more than 3.
        count = max(1, int(np.ceil(np.round(share * len(values), 9))))
        kept[np.argsort(-values, kind="stable")[:count]] = True
    return kept


def _above_quantile(values: Float64, share: float) -> Bool:
    if not len(values):
        return np.zeros(0, bool)
    reaches: Bool = values >= np.quantile(values, 1 - share)
    return reaches


_RULES = {"count": _largest, "quantile": _above_quantile}
