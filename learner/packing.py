"""How rows are shared out over ranks and micro-batches, and laid out one behind the other.

Refuses to know the model (what a row costs is handed in) and the loss. Every rank computes the same
shares from the same lengths and takes its own. Legend: L tokens of a block, N completion tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo.types import Origin, TrainRow
from learner.row_cost import BY_TOKENS, RowCost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Several rows behind one another; `position_ids` restart at each of them."""

    rows: tuple[TrainRow, ...]  # in the order of the tokens below
    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [1, L]
    predictors: Tensor  # [N] place in the block that predicts each completion token
    targets: Tensor  # [N] the completion tokens
    row: Tensor  # [N] index into `rows`
    places: tuple[int, ...]  # of `rows` among the rows that were shared out
    is_idle: bool = False  # one weightless row stands in where a rank has none of its own

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row, context included."""
        return tuple(row.num_tokens for row in self.rows)


def shares(
    lengths: Sequence[int], *, max_tokens: int, ranks: int, cost: RowCost = BY_TOKENS
) -> list[list[list[int]]]:
    """Which rows go into which micro-batch: [rank][micro-batch] -> indices of `lengths`.

    Every rank has the same number of micro-batches, because ZeRO-3 gathers parameters in
    lock-step; some may be empty. The blocks that run at the same time cost about the same.
    """
    count = max(1, -(-sum(lengths) // (max_tokens * ranks)))
    while (parts := _balanced(lengths, count * ranks, max_tokens=max_tokens, cost=cost)) is None:
        count += 1
    # sorted() is stable, so equal costs keep their order and all ranks agree.
    parts = sorted(parts, key=lambda part: -_total(cost, lengths, part))
    mine: list[list[list[int]]] = [[] for _ in range(ranks)]
    spent = [0] * ranks
    for start in range(0, len(parts), ranks):  # the costliest to the rank with the least so far
        least_first = sorted(range(ranks), key=lambda rank: (spent[rank], rank))
        for rank, part in zip(least_first, parts[start : start + ranks], strict=True):
            mine[rank].append(part)
            spent[rank] += _total(cost, lengths, part)
    return mine


def pack(rows: Sequence[TrainRow], places: Sequence[int] | None = None) -> Block:
    """Lay whole rows out behind one another."""
    lengths = [row.num_tokens for row in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate([part for row in rows for part in (row.context, row.tokens)])
    predictors = [
        start + len(row.context) - 1 + np.arange(len(row.tokens))
        for start, row in zip(starts.tolist(), rows, strict=True)
    ]
    positions = np.concatenate([np.arange(length) for length in lengths])
    num_tokens = [len(row.tokens) for row in rows]
    return Block(
        rows=tuple(rows),
        input_ids=torch.from_numpy(tokens.astype(np.int64))[None],
        position_ids=torch.from_numpy(positions)[None],
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate([row.tokens for row in rows]).astype(np.int64)),
        row=torch.from_numpy(np.repeat(np.arange(len(rows)), num_tokens)),
        places=tuple(range(len(rows)) if places is None else places),
    )


def blocks(
    rows: Sequence[TrainRow],
    *,
    max_tokens: int,
    rank: int,
    ranks: int,
    cost: RowCost = BY_TOKENS,
) -> list[Block]:
    """The micro-batches of one rank; a rank without rows computes one that counts for nothing."""
    for row in rows:
        if len(row.context) == 0 or len(row.tokens) == 0:
            raise ValueError(
                f"row {row.index} of group {row.group} has {len(row.context)} context and "
                f"{len(row.tokens)} completion tokens: both must be at least 1"
            )
    lengths = [row.num_tokens for row in rows]
    mine = shares(lengths, max_tokens=max_tokens, ranks=ranks, cost=cost)[rank]
    return [pack([rows[i] for i in part], part) if part else idle(rows) for part in mine]


def idle(rows: Sequence[TrainRow]) -> Block:
    """The shortest row once more, counting for nothing."""
    place = min(range(len(rows)), key=lambda index: rows[index].num_tokens)
    return replace(pack([weightless(rows[place])], [place]), is_idle=True)


def weightless(row: TrainRow) -> TrainRow:
    """The same tokens, in no loss and no metric."""
    return replace(
        row,
        weights=np.zeros_like(row.weights),
        origins=np.full_like(row.origins, Origin.GUIDANCE),
        versions=np.full_like(row.versions, -1),
    )


def _balanced(
    lengths: Sequence[int], num_parts: int, *, max_tokens: int, cost: RowCost
) -> list[list[int]] | None:
    """Longest first, each to the cheapest part with room for it; None: no part has.

    A row of more than `max_tokens` goes alone.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    heap = [(0, part, 0) for part in range(num_parts)]  # cost, part, tokens
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = []
        while heap and heap[0][2] and heap[0][2] + lengths[index] > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        spent, part, tokens = heapq.heappop(heap)
        parts[part].append(index)
        full.append((spent + cost(lengths[index]), part, tokens + lengths[index]))
        for entry in full:
            heapq.heappush(heap, entry)
    return parts


def _total(cost: RowCost, lengths: Sequence[int], part: Sequence[int]) -> int:
    return sum(cost(lengths[index]) for index in part)
