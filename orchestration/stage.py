"""The rows that steps leave behind for another kind of update, until it is time for it.

Cuts them into a batch, and writes them beside a checkpoint. Refuses to know how an algorithm
makes such rows and what loss they are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo.pipeline import RewardedGroup, Stage, State
from grpo.types import TrainBatch, TrainRow
from orchestration.row_arrays import row_arrays, rows_of

STAGE_FILE = "stage_rows.npz"


def left_rows(
    stage: Stage, rewarded: Sequence[RewardedGroup], state: State
) -> tuple[TrainRow, ...]:
    """What the groups of a step leave behind."""
    return tuple(row for item in rewarded for row in stage.collect(item, state))


def stage_batch(
    stage: Stage, rows: Sequence[TrainRow], *, step: int, version: int
) -> TrainBatch | None:
    """All rows in updates of `groups_per_update` groups; None: the steps have left none."""
    by_group: dict[int, list[TrainRow]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    groups = list(by_group.values())
    size = stage.groups_per_update
    updates = [
        tuple(row for group in groups[start : start + size] for row in group)
        for start in range(0, len(groups), size)
    ]
    if not updates:
        return None
    return TrainBatch(
        step=step,
        version=version,
        updates=tuple(updates),
        is_stage=True,
        learning_rate_scale=stage.learning_rate_scale,
    )


class WaitingRows:
    """The rows between two stages, as a part of a checkpoint."""

    def __init__(self, rows: tuple[TrainRow, ...] = ()) -> None:
        self.rows = rows

    async def save(self, folder: Path) -> None:
        """Write the rows below `folder`."""
        await asyncio.to_thread(write_rows, folder, self.rows)

    async def load(self, folder: Path) -> None:
        """Have the rows that `save` wrote."""
        self.rows = await asyncio.to_thread(read_rows, folder)


def write_rows(folder: Path, rows: Sequence[TrainRow]) -> None:
    """One file below `folder`; none where there are no rows."""
    if not rows:
        return
    with (folder / STAGE_FILE).open("wb") as file:
        np.savez(file, allow_pickle=False, **row_arrays(rows))


def read_rows(folder: Path) -> tuple[TrainRow, ...]:
    """The rows that `write_rows` wrote there."""
    path = folder / STAGE_FILE
    if not path.exists():
        return ()
    with np.load(path, allow_pickle=False) as file:
        return rows_of({name: file[name] for name in file.files})
