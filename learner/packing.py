"""How rows are shared out over ranks and micro-batches, and laid out in blocks without padding.

Refuses to know the model and the loss. Every rank computes the same shares from the same lengths
and takes its own. Legend: B rows of a block, L its length, N completion tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo.types import Origin, TrainRow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Several rows behind one another in each of B lines; `position_ids` restart at each row."""

    rows: tuple[TrainRow, ...]  # in the order of the tokens below
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L] 0 on padding, which is therefore a sequence of its own
    predictors: Tensor  # [N] place in the flattened block that predicts each completion token
    targets: Tensor  # [N] the completion tokens
    row: Tensor  # [N] index into `rows`
    places: tuple[int, ...]  # of `rows` among the rows that were shared out
    is_idle: bool = False  # one weightless row stands in where a rank has none of its own


def shares(lengths: Sequence[int], *, max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Which rows go into which micro-batch: [rank][micro-batch] -> indices of `lengths`.

    Every rank has the same number of micro-batches, because ZeRO-3 gathers parameters in
    lock-step; some may be empty. The blocks that run at the same time cost about the same.
    """
    count = max(1, -(-sum(lengths) // (max_tokens * ranks)))
    while True:
        parts = _balanced(lengths, count * ranks)
        if all(len(part) <= 1 or _area(lengths, part) <= max_tokens for part in parts):
            break
        count += 1
    # sorted() is stable, so equal areas keep their order and all ranks agree.
    parts = sorted(parts, key=lambda part: -_area(lengths, part))
    return [parts[rank::ranks] for rank in range(ranks)]


def lines(lengths: Sequence[int]) -> list[list[int]]:
    """First fit decreasing: indices of `lengths` in lines no longer than the longest.

    Lengths 5, 3, 2, 4: lines [5], [4], [3, 2].
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    capacity = lengths[order[0]]
    filled: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            filled.append([])
            room.append(capacity)
            place = len(filled) - 1
        filled[place].append(index)
        room[place] -= lengths[index]
    return filled


def pack(rows: Sequence[TrainRow], places: Sequence[int] | None = None) -> Block:
    """Lay whole rows out in a block as long as the longest."""
    layout = lines([row.num_tokens for row in rows])
    length = max(row.num_tokens for row in rows)
    input_ids = np.zeros((len(layout), length), np.int64)
    position_ids = np.zeros((len(layout), length), np.int64)
    predictors: list[np.ndarray] = []
    order = [index for indices in layout for index in indices]
    ordered = [rows[index] for index in order]
    for line, indices in enumerate(layout):
        start = 0
        for row in (rows[index] for index in indices):
            end = start + row.num_tokens
            input_ids[line, start:end] = np.concatenate([row.context, row.tokens])
            position_ids[line, start:end] = np.arange(row.num_tokens)
            first = line * length + start + len(row.context)
            predictors.append(np.arange(first - 1, first - 1 + len(row.tokens)))
            start = end
    num_tokens = [len(row.tokens) for row in ordered]
    return Block(
        rows=tuple(ordered),
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate([row.tokens for row in ordered]).astype(np.int64)),
        row=torch.from_numpy(np.repeat(np.arange(len(ordered)), num_tokens)),
        places=tuple(order if places is None else (places[index] for index in order)),
    )


def blocks(rows: Sequence[TrainRow], *, max_tokens: int, rank: int, ranks: int) -> list[Block]:
    """The micro-batches of one rank; a rank without rows computes one that counts for nothing."""
    for row in rows:
        if len(row.context) == 0 or len(row.tokens) == 0:
            raise ValueError(
                f"row {row.index} of group {row.group} has {len(row.context)} context and "
                f"{len(row.tokens)} completion tokens: both must be at least 1"
            )
    lengths = [row.num_tokens for row in rows]
    mine = shares(lengths, max_tokens=max_tokens, ranks=ranks)[rank]
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


def _balanced(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    heap = [(0, part) for part in range(num_parts)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, part = heapq.heappop(heap)
        parts[part].append(index)
        heapq.heappush(heap, (tokens + lengths[index], part))
    return parts


def _area(lengths: Sequence[int], part: Sequence[int]) -> int:
    """Tokens of the block that a part becomes, padding included."""
    chosen = [lengths[index] for index in part]
    return len(lines(chosen)) * max(chosen) if chosen else 0
