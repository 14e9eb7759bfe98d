"""What a preference model is asked, as rollouts by their tokens and lengths of their prefixes.

A prefix of a longer one needs no forward pass of its own, so it goes with it. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.types import Int32
from reward_services.user_functions import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixRow:
    """One rollout, or as much of it as is asked about, and the lengths of its prefixes."""

    context: Int32  # [L]
    tokens: Int32  # [T]
    ends: tuple[int, ...]  # tokens of each prefix, 0 (nothing but the prompt) to T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedPrefixes:
    """Rows, and for each span of a batch which prefix of which row it is."""

    rows: tuple[PrefixRow, ...]
    places: tuple[tuple[int, int] | None, ...]  # (row, place in its ends); None: no prefix


def asked_prefixes(batch: Batch) -> AskedPrefixes:
    """The longest prefixes become rows; the others lie in one of them.

    "ab", "abcd", "" and "ax" after the same prompt: the rows "abcd" (ends 4, 2, 0) and "ax".
    """
    found: dict[int, tuple[int, int]] = {}
    rows: list[tuple[bytes, Int32, Int32, list[int]]] = []
    prefixes = [place for place, start in enumerate(batch.starts) if start == 0]
    for place in sorted(prefixes, key=lambda place: -len(batch.completion_ids[place])):
        tokens = np.asarray(batch.completion_ids[place], np.int32)
        context = batch.prompt_ids[place]
        row = _row_that_begins_with(rows, context.tobytes(), tokens)
        if row is None:
            row = len(rows)
            rows.append((context.tobytes(), context, tokens, []))
        ends = rows[row][3]
        if len(tokens) not in ends:
            ends.append(len(tokens))
        found[place] = (row, ends.index(len(tokens)))
    return AskedPrefixes(
        rows=tuple(
            PrefixRow(context=context, tokens=tokens, ends=tuple(ends))
            for _, context, tokens, ends in rows
        ),
        places=tuple(found[i] if i in found else None for i in range(len(batch))),
    )


def _row_that_begins_with(
    rows: Sequence[tuple[bytes, Int32, Int32, list[int]]], context: bytes, tokens: Int32
) -> int | None:
    for place, (other, _, longer, _) in enumerate(rows):
        if other == context and np.array_equal(longer[: len(tokens)], tokens):
            return place
    return None
