"""The folder of one run: its settings, its two record files and its summary.

Knows how files are created, appended and cut back; refuses to know what the records mean
(`records.py`), how checkpoints are written (`checkpoint.py`) and what time it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, TextIO

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from grpo.errors import UserError

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
GROUPS_FILE = "groups.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
ID_FILE = "run_id"

# Every line begins with its step, so that cutting back need not parse megabytes of tokens.
LINE_STEP = re.compile(rb'\{"step":(\d+)[,}]')
# The folder's name is used in shells and URLs.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What is left to say when a run is over; the content of summary.json."""

    name: str
    status: RunStatus
    cause: str | None = None  # why it was interrupted or failed, in plain words
    seed: int
    steps: int  # optimiser steps done, earlier parts of a resumed run included
    planned_steps: int
    before: Mapping[str, object] | None = None  # EvalReport.as_json() of the starting model
    after: Mapping[str, object] | None = None
    wall_s: Mapping[str, float] = field(default_factory=dict)  # by phase
    tokens: Mapping[str, int] = field(default_factory=dict)  # generated, trained, ...
    dropped: Mapping[str, int] = field(default_factory=dict)  # groups by reason
    skipped: Mapping[str, int] = field(default_factory=dict)  # prompts by reason, on purpose
    replaced: Mapping[str, int] = field(default_factory=dict)  # lost workers by role
    versions: Mapping[str, str] = field(default_factory=dict)


class RunDirectory:
    """Owns the record files of one run: nobody else writes to them while it is open.

    Every line is in the kernel's hands once written: it outlives this process.
    """

    def __init__(self, path: Path, lock: TextIO) -> None:
        self.path = path
        self.remarks: list[str] = []  # what was wrong with the records of a run that goes on
        self._lock = lock
        self._metrics = _open_lines(path / METRICS_FILE)
        self._groups = _open_lines(path / GROUPS_FILE)

    @classmethod
    def create(
        cls,
        output: Path,
        name: str,
        *,
        now: datetime,
        config: Mapping[str, object],
        versions: Mapping[str, str],
    ) -> RunDirectory:
        """A new folder `output/NAME-YYYYmmdd-HHMMSS`; it appears with its settings or not at all.

        `config` is the resolved recipe as plain YAML values: the file is itself a recipe.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"run name {name!r} cannot be part of a folder's name; use letters, digits, "
                "'.', '_' and '-', beginning with a letter or digit"
            )
        stem = f"{name}-{now:%Y%m%d-%H%M%S}"
        draft = output / f".{stem}.{os.getpid()}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            draft.mkdir()
        except OSError as error:
            raise UserError(
                f"cannot write to the output folder {output} ({error.strerror}); "
                "set `output` to a folder that you may write to"
            ) from error
        try:
            (draft / CONFIG_FILE).write_text(_as_yaml(config), encoding="utf-8")
            write_json(draft / VERSIONS_FILE, dict(versions))
            (draft / ID_FILE).write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
            path = _claim(draft, output / stem)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # unless it was renamed, it is half a run
        return cls(path, _locked(path))

    @classmethod
    def reopen(
        cls, path: Path, *, step: int, first: Callable[[], None] = lambda: None
    ) -> RunDirectory:
        """Continue a run after `step`: later records go, because their steps will be done again.

        `first` is done before they go, once the run is this process's own.
        """
        lock = _locked(path)
        first()
        remarks = _cut_records_back(path, step)
        (path / SUMMARY_FILE).unlink(missing_ok=True)
        reopened = cls(path, lock)
        reopened.remarks = remarks
        return reopened

    def change_config(self, config: Mapping[str, object]) -> None:
        """The recipe as it is from now on."""
        draft = self.path / f".{CONFIG_FILE}.draft"
        draft.write_text(_as_yaml(config), encoding="utf-8")
        draft.replace(self.path / CONFIG_FILE)

    def turn_back(self, step: int) -> None:
        """The same while the run is open: its lock is kept."""
        self._metrics.close()
        self._groups.close()
        _cut_records_back(self.path, step)
        self._metrics = _open_lines(self.path / METRICS_FILE)
        self._groups = _open_lines(self.path / GROUPS_FILE)

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        _write(self._metrics, encode_line(step, metrics))

    def append_group(self, step: int, record: Mapping[str, object]) -> None:
        """One line of groups.jsonl; `step` used the group, or was being filled when it fell out."""
        _write(self._groups, encode_line(step, record))

    def write_summary(self, summary: RunSummary) -> None:
        """Write summary.json; a reader sees the old file or the new one, never half of it."""
        write_json(self.path / SUMMARY_FILE, asdict(summary))

    def close(self) -> None:
        """Close the record files; the run may be continued."""
        self._metrics.close()
        self._groups.close()
        self._lock.close()


def run_id(run: Path) -> str | None:
    """What tells this run from all others, wherever its folder is moved; None: it has no id."""
    try:
        return (run / ID_FILE).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def version_changes(run: Path, versions: Mapping[str, str]) -> list[str]:
    """What differs from the software that began the run: `torch 2.11.0 -> 2.13.0`, ...

    One entry that says so if it is not known what began it.
    """
    try:
        text = (run / VERSIONS_FILE).read_bytes()
        before = TypeAdapter(dict[str, str]).validate_json(text)
    except (OSError, ValidationError) as error:
        what = "gone" if isinstance(error, FileNotFoundError) else "damaged"
        return [f"not known, as {VERSIONS_FILE} is {what}"]
    names = sorted(before.keys() | versions.keys())
    pairs = [(name, before.get(name, "none"), versions.get(name, "none")) for name in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def encode_line(step: int, record: Mapping[str, object]) -> bytes:
    """One JSON line that begins with its step; numbers that are not finite are written as null.

    pydantic's encoder, as the lines are mostly numbers: a fifth of the time of json.dumps.
    """
    assert "step" not in record, "the step is given apart, so that it comes first"
    return to_json({"step": step, **record}, inf_nan_mode="null") + b"\n"


def _as_yaml(config: Mapping[str, object]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file aside, flush it to disk and rename it into place."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(_finite(value), file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _claim(draft: Path, wanted: Path) -> Path:
    """Rename the draft to the wanted name, or to `-2`, `-3`, ... where runs share a second.

    The rename itself is the test: it fails on a folder that is not empty, and a run's never is.
    """
    for attempt in range(1, 1000):
        path = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}-{attempt}")
        try:
            return draft.rename(path)
        except OSError:
            if not path.exists():
                raise
    raise UserError(f"{wanted} and 998 folders named after it exist; choose another run name")


def _locked(path: Path) -> TextIO:
    """Hold the run for this process; the lock goes with the process, however it ends."""
    file = (path / LOCK_FILE).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error: a file system without locks, where two writers go unnoticed.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise UserError(
                f"another process is writing to {path}: wait until it ends, or stop it"
            ) from error
    return file


def _open_lines(path: Path) -> BinaryIO:
    return path.open("ab")


def _write(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()


def _cut_records_back(run: Path, step: int) -> list[str]:
    """What was wrong with the records that stay."""
    remarks = []
    for file in (run / METRICS_FILE, run / GROUPS_FILE):
        if not file.exists():
            if step > 0:
                remarks.append(f"{file.name} is gone: the records up to step {step} are lost")
        elif num_strange := _cut_back(file, step):
            remarks.append(f"{file.name}: left out {num_strange} lines that covey did not write so")
    return remarks


def _cut_back(path: Path, step: int) -> int:
    """How many of the lines were no records."""
    draft = path.with_name(f".{path.name}.draft")
    num_strange = 0
    with path.open("rb") as source, draft.open("wb") as target:
        for line in source:
            if not line.endswith(b"\n"):
                continue  # it was being written when the process died
            found = LINE_STEP.match(line)
            num_strange += found is None
            if found is not None and int(found[1]) <= step:
                target.write(line)
    draft.replace(path)
    return num_strange
