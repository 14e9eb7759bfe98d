"""The manifest of a checkpoint: seals its files, and tells whether they are still what was sealed.

    RUN/checkpoints/step_40/manifest.json   step, run, and size and SHA-256 of every other file

Whatever is wrong with the manifest itself is damage, too. Refuses to know which checkpoint is
chosen and what is in its files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from grpo.config import Schema
from orchestration.run_directory import run_id, write_json

MANIFEST_FILE = "manifest.json"
STATE_FILE = "driver_state.json"
HASH_THREADS = 4  # learners write a file per rank; one thread hashes about 0.7 GB/s
_LEARNER = "learner/"  # what every learner writes is below it
_PREFIX = "step_"


class SealedFile(Schema):
    """What a file was when the checkpoint was completed."""

    bytes: int
    sha256: str


class Manifest(Schema):
    """The content of manifest.json."""

    step: int
    run: str | None = None  # None: of a version whose runs had no id
    files: dict[str, SealedFile]  # by path within the checkpoint


def folder_name(step: int | str) -> str:
    """Of the checkpoint of a step."""
    return f"{_PREFIX}{step}"


def step_named(name: str) -> int | None:
    """The step whose folder has this name, None if no step's has: `step_4`, but not `step_04`."""
    number = name.removeprefix(_PREFIX)
    # isdigit alone is true for more than int() reads.
    is_number = number.isascii() and number.isdigit()
    return int(number) if is_number and name == folder_name(int(number)) else None


def seal(draft: Path, step: int) -> None:
    """Write the manifest of all files in the draft of a checkpoint; all is on disk after it."""
    paths = sorted(path for path in draft.rglob("*") if path.is_file())
    files = {
        path.relative_to(draft).as_posix(): SealedFile(bytes=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, _digests(paths, flush=True), strict=True)
    }
    for folder in {path.parent for path in paths}:
        flush_folder(folder)
    manifest = Manifest(step=step, run=run_id(_run_of(draft)), files=files)
    write_json(draft / MANIFEST_FILE, manifest.model_dump())
    flush_folder(draft)


def find_damage(folder: Path, *, checksums: bool, below: str = "") -> str | None:
    """What differs from the manifest, None if nothing; sizes always, contents if asked.

    `below` is the beginning of the paths that matter.
    """
    if not folder.is_dir():
        return "its folder is gone"
    path = folder / MANIFEST_FILE
    if not path.exists():
        return f"there is no {MANIFEST_FILE} (the checkpoint was not completed)"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
        wrong = _not_of_this_place(manifest, folder) or _lacking(manifest)
        if wrong is not None:
            return wrong
        files = {name: file for name, file in manifest.files.items() if name.startswith(below)}
        return _changed_sizes(folder, files) or (
            _changed_contents(folder, files) if checksums else None
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{MANIFEST_FILE} is damaged ({place + ': ' if place else ''}{first['msg']})"
    except OSError as error:
        return f"it cannot be read ({error})"


def flush_folder(folder: Path) -> None:
    """Make renames within the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run_of(folder: Path) -> Path:
    return folder.parent.parent


def _not_of_this_place(manifest: Manifest, folder: Path) -> str | None:
    """A whole checkpoint, but of another step or of another run."""
    if folder.name != folder_name(manifest.step):
        return f"{MANIFEST_FILE} says that it is {folder_name(manifest.step)}"
    run = run_id(_run_of(folder))
    if None in (run, manifest.run) or run == manifest.run:
        return None
    return f"it was written by another run (id {manifest.run}; this one has {run})"


def _lacking(manifest: Manifest) -> str | None:
    """A manifest of nothing would vouch for anything."""
    if STATE_FILE not in manifest.files:
        return f"{MANIFEST_FILE} does not name {STATE_FILE}"
    if not any(name.startswith(_LEARNER) for name in manifest.files):
        return f"{MANIFEST_FILE} names no file of the learner"
    return None


def _changed_sizes(folder: Path, files: dict[str, SealedFile]) -> str | None:
    for name, sealed in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != sealed.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {sealed.bytes}"
    return None


def _changed_contents(folder: Path, files: dict[str, SealedFile]) -> str | None:
    digests = _digests([folder / name for name in files], flush=False)
    for (name, sealed), digest in zip(files.items(), digests, strict=True):
        if digest != sealed.sha256:
            return f"the contents of {name} have changed"
    return None


def _digests(paths: Sequence[Path], *, flush: bool) -> list[str]:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(partial(_digest, flush=flush), paths))


def _digest(path: Path, *, flush: bool) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest
