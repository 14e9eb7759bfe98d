"""Part marks for questions with several right options, read from the answer's own text.

Refuses to know any scorer. Shapes: G rollouts in a group.
"""

from __future__ import annotations

import numpy as np

from grpo.errors import UserError
from grpo.pipeline import State
from grpo.types import Float64, Group


def option_share(
    group: Group,
    state: State,
    *,
    coefficient: float,
    column: str | None,
    opening: str,
    closing: str | None,
) -> Float64:
    """coefficient * share of the right options that an answer names, 0 with a wrong one. [G]

    TW-GRPO's multi-level reward (arXiv:2505.24718). Options are separated by commas, in any order
    and case; the right ones stand in a column of the data, or in its reference (column None). The
    released code also compares symbolically; that is a scorer's work here. Right A, C, D: "A" 1/3,
    "A,C" 2/3, "A,C,D" 1, "A,B" 0, nothing 0.
    """
    right = _right_options(group, column)
    texts = [_stated(rollout.text, opening, closing) for rollout in group.rollouts]
    return coefficient * np.array([share_of(text, right) for text in texts], np.float64)


def share_of(stated: str, right: str) -> float:
    """|stated| / |right| if all that is stated is right and something is, else 0."""
    found, wanted = _options(stated), _options(right)
    return len(found) / len(wanted) if found and found <= wanted else 0.0


def _options(text: str) -> frozenset[str]:
    return frozenset(part.strip().casefold() for part in text.split(",") if part.strip())


def _stated(text: str, opening: str, closing: str | None) -> str:
    """What stands between the last `opening` and the `closing` after it; nothing without it."""
    _, mark, rest = text.rpartition(opening)
    if not mark:
        return ""
    return rest if closing is None else rest.partition(closing)[0]


def _right_options(group: Group, column: str | None) -> str:
    prompt = group.prompt
    value = prompt.reference if column is None else prompt.columns.get(column)
    if not isinstance(value, str) or not _options(value):
        where = "no reference answer" if column is None else f"{value!r} in column {column!r}"
        raise UserError(
            f"prompt {prompt.id!r} has {where}; option_coef needs the right options there as text, "
            "separated by commas: add them to the data, or set algorithm.option_column"
        )
    return value
