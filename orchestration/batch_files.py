"""What the learner was given in each step, one file for each batch, in RUN/batches.

    step_7.npz, step_7_stage.npz             batches that were trained on
    failed_step_7.npz                        one that the learner could not train on

A file holds the rows once, however many updates and epochs they are in, and a JSON header: which
rows make which update, and what the learner reported. Nothing in it is pickled. Refuses to know
the learner.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue, TypeAdapter

from grpo.errors import UserError
from grpo.types import TrainBatch, TrainRow
from orchestration.row_arrays import Arrays, row_arrays, rows_of

BATCHES = "batches"
FORMAT = 1  # raise it when a file of today could be misread by the code of yesterday
HEADER = "header"
# What zipfile raises where a directory is damaged. RuntimeError: an entry seems to be encrypted, or
# (NotImplementedError) compressed in a way that is not known.
_OF_DAMAGE = (OSError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
_NAME = re.compile(r"(failed_)?step_(\d+)(_stage)?\.npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a batch: metrics, or the error that ended the run."""

    metrics: Mapping[str, float] | None = None
    error: str | None = None
    place: tuple[int, int, int] | None = None  # group, rollout, completion token at fault


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedBatch:
    """A batch with what came of it."""

    batch: TrainBatch
    outcome: Outcome
    total_steps: int  # they shaped its learning rate
    # Settings of the learner that a run may change on its way: they decide about rounding.
    learner: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFile:
    """One file of the folder, by what its name says."""

    path: Path
    step: int
    is_stage: bool
    is_failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    format: int
    step: int
    version: int
    is_stage: bool
    learning_rate_scale: float
    updates: list[list[int]]  # places of the rows
    total_steps: int
    outcome: Outcome
    learner: dict[str, JsonValue] = field(default_factory=dict)  # none: written before there were


def write_batch(run: Path, recorded: RecordedBatch) -> Path:
    """Write aside and rename: a reader sees a whole file or none."""
    path = _path(run, recorded.batch, is_failed=recorded.outcome.error is not None)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **_arrays(recorded))
    draft.replace(path)
    return path


def forget_failure(run: Path, batch: TrainBatch) -> None:
    """The batch was trained on at last: what failed was an attempt that was abandoned."""
    _path(run, batch, is_failed=True).unlink(missing_ok=True)


def read_batch(path: Path) -> RecordedBatch:
    """What `write_batch` wrote; rows that updates share are the same objects again."""
    try:
        arrays = _whole_arrays(path)
        header = TypeAdapter(_Header).validate_json(arrays.pop(HEADER).tobytes())
    except (*_OF_DAMAGE, ValueError, KeyError) as error:
        raise UserError(f"{path} is no recorded batch, or is damaged: {error}") from error
    if header.format != FORMAT:
        raise UserError(
            f"{path} has format {header.format}, this version of covey reads format {FORMAT}; use "
            "the version of covey that wrote it (see versions.json of the run)"
        )
    rows = rows_of(arrays)
    batch = TrainBatch(
        step=header.step,
        version=header.version,
        updates=tuple(tuple(rows[place] for place in update) for update in header.updates),
        is_stage=header.is_stage,
        learning_rate_scale=header.learning_rate_scale,
    )
    return RecordedBatch(
        batch=batch,
        outcome=header.outcome,
        total_steps=header.total_steps,
        learner=header.learner,
    )


def batch_files(run: Path) -> list[BatchFile]:
    """All files of the folder in the order in which the learner was given them."""
    found = []
    for path in (run / BATCHES).glob("*.npz"):
        name = _NAME.fullmatch(path.name)
        if name is not None:
            found.append(
                BatchFile(
                    path=path,
                    step=int(name[2]),
                    is_stage=name[3] is not None,
                    is_failed=name[1] is not None,
                )
            )
    return sorted(found, key=lambda file: (file.step, file.is_stage))


def drop_later(run: Path, step: int) -> None:
    """Forget what was trained on after `step`: those steps will be done again."""
    for file in batch_files(run):
        if file.step > step and not file.is_failed:
            file.path.unlink()


def drop_earlier(run: Path, step: int) -> None:
    """Forget `step` and all before it: a checkpoint holds what they have taught."""
    for file in batch_files(run):
        if file.step <= step:
            file.path.unlink()


def _path(run: Path, batch: TrainBatch, *, is_failed: bool) -> Path:
    failed, stage = "failed_" if is_failed else "", "_stage" if batch.is_stage else ""
    return run / BATCHES / f"{failed}step_{batch.step}{stage}.npz"


def _whole_arrays(path: Path) -> Arrays:
    """All arrays of a file, after every checksum in it was found to be right.

    numpy trusts the shape that it reads: of an array that seems to be shorter than it is, the rest
    would be left out in silence.
    """
    with zipfile.ZipFile(path) as file:
        wrong = file.testzip()
    if wrong is not None:
        raise ValueError(f"the contents of {wrong} have changed")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _arrays(recorded: RecordedBatch) -> Arrays:
    batch = recorded.batch
    places: dict[int, int] = {}
    rows: list[TrainRow] = []
    for row in (row for update in batch.updates for row in update):
        if id(row) not in places:
            places[id(row)] = len(rows)
            rows.append(row)
    header = _Header(
        format=FORMAT,
        step=batch.step,
        version=batch.version,
        is_stage=batch.is_stage,
        learning_rate_scale=batch.learning_rate_scale,
        updates=[[places[id(row)] for row in update] for update in batch.updates],
        total_steps=recorded.total_steps,
        outcome=recorded.outcome,
        learner=dict(recorded.learner),
    )
    # Python writes NaN and reads it back: a metric that is no number stays one.
    text = json.dumps(asdict(header)).encode()
    return row_arrays(rows) | {HEADER: np.frombuffer(text, np.uint8)}
