"""How per-token losses become one number: a coefficient per token of one optimiser update.

Every mean here is linear in the per-token loss, so its coefficients can be computed once, from
the masks of the whole update, and the learner only sums. Untrained tokens get 0.
Shapes: T tokens; B rows (rollouts) in the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo.pipeline import Aggregation, PerToken
from grpo.types import Bool


def token_mean(masks: Sequence[list[Bool]]) -> list[PerToken]:
    """Mean over the trained tokens of the update: long answers weigh more (DAPO).

    A row without a trained token adds nothing to the denominator. Lengths 1 and 3: 1/4 each.
    """
    num_trained = sum(int(mask.sum()) for group in masks for mask in group)
    return [[mask / max(num_trained, 1) for mask in group] for group in masks]


def sequence_mean(masks: Sequence[list[Bool]]) -> list[PerToken]:
    """Mean over rows of the mean over a row's trained tokens: every answer weighs 1/B (GRPO).

    A row without a trained token stays in B, as in TRL (verl leaves it out), so masking a row
    does not make the others weigh more. Lengths 1 and 3: 1/2 and 1/6 per token.
    """
    num_rows = sum(len(group) for group in masks)
    return [[mask / (num_rows * max(int(mask.sum()), 1)) for mask in group] for group in masks]


def fixed_length(masks: Sequence[list[Bool]], *, max_tokens: int) -> list[PerToken]:
    """Sum over trained tokens over B * max_tokens: no answer's length in its weight (Dr. GRPO).

    A row without a trained token stays in B. Lengths 1 and 3, max_tokens 4: 1/8 each.
    """
    num_rows = sum(len(group) for group in masks)
    return [[mask / (num_rows * max_tokens) for mask in group] for group in masks]


def group_token_mean(masks: Sequence[list[Bool]]) -> list[PerToken]:
    """Mean over groups of the mean over a group's trained tokens: every prompt weighs 1/P.

    A group without a trained token stays in P. Groups of lengths 1, 3 and 2, 2: 1/8 each; 1, 1 and
    2, 2: 1/4 and 1/8.
    """
    sizes = [max(sum(int(mask.sum()) for mask in group), 1) for group in masks]
    return [
        [mask / (len(masks) * size) for mask in group]
        for group, size in zip(masks, sizes, strict=True)
    ]


def of_trained_rows(masks: Sequence[list[Bool]], *, aggregation: Aggregation) -> list[PerToken]:
    """Another mean, as if rows without a trained token were not there.

    For rollouts that serve another purpose, such as drafts: lengths 1 and 3 and an untrained one
    in a sequence mean: 1/2 and 1/6 per token, where `sequence_mean` alone gives 1/3 and 1/9.
    """
    kept = iter(row for group in aggregation(_trained_rows(masks)) for row in group)
    return [
        [next(kept) if mask.any() else np.zeros(len(mask)) for mask in group] for group in masks
    ]


def _trained_rows(masks: Sequence[list[Bool]]) -> list[list[Bool]]:
    return [[mask for mask in group if mask.any()] for group in masks]
