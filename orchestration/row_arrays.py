"""Rows of the learner as a few plain arrays, and back, bit for bit.

Refuses to know files and what the rows are for. T tokens of a completion, L of a context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo.types import Float32, TrainRow

Arrays = dict[str, NDArray[Any]]
NUMBERS = ("group", "index", "is_cross_context")  # of a row
STREAMS = (  # [T]
    "tokens",
    "weights",
    "advantages",
    "policy_weights",
    "behaviour_log_probs",
    "versions",
    "origins",
)


def row_arrays(rows: Sequence[TrainRow]) -> Arrays:
    """All streams of the rows one behind the other, with their lengths; at least one row."""
    arrays: Arrays = {name: np.array([getattr(row, name) for row in rows]) for name in NUMBERS}
    arrays |= {name: np.concatenate([getattr(row, name) for row in rows]) for name in STREAMS}
    return arrays | {
        "lengths": np.array([len(row.tokens) for row in rows]),
        "context": np.concatenate([row.context for row in rows]),
        "context_lengths": np.array([len(row.context) for row in rows]),
        "reference_log_probs": np.concatenate([_reference(row) for row in rows]),
        "has_reference": np.array([row.reference_log_probs is not None for row in rows]),
    }


def rows_of(arrays: Mapping[str, NDArray[Any]]) -> tuple[TrainRow, ...]:
    """The rows that `row_arrays` was given."""
    cuts = np.cumsum(arrays["lengths"])[:-1]
    streams = {name: np.split(arrays[name], cuts) for name in (*STREAMS, "reference_log_probs")}
    streams["context"] = np.split(arrays["context"], np.cumsum(arrays["context_lengths"])[:-1])
    rows = []
    for place, is_known in enumerate(arrays["has_reference"].tolist()):
        own: dict[str, Any] = {name: parts[place] for name, parts in streams.items()}
        if not is_known:
            own["reference_log_probs"] = None
        own |= {name: arrays[name][place].item() for name in NUMBERS}
        rows.append(TrainRow(**own))
    return tuple(rows)


def _reference(row: TrainRow) -> Float32:
    """[T] zeros where it is not known."""
    known = row.reference_log_probs
    return np.zeros(len(row.tokens), np.float32) if known is None else known
