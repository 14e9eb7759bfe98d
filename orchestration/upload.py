"""Which files of a folder go to a cluster with a job, and their archive.

What git sees, without what a run leaves behind, and with whatever the recipe names: data files
are often ignored by git, and a job without them would fail at once.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

from grpo.errors import UserError

# Left out wherever no git says what belongs to the project.
EXCLUDED_FOLDERS = frozenset(
    {".git", ".venv", "venv", "node_modules", "__pycache__", "runs", "wandb"}
)
MAX_UPLOAD_BYTES = 500 << 20  # Ray's own limit; models belong on a path that all nodes share
NUM_SHOWN = 5


def job_files(folder: Path, *, named: Sequence[Path], without: Sequence[Path]) -> list[Path]:
    """The files to upload. `named` are files and folders that the job needs, ignored or not.

    `without`: folders that are never uploaded, such as that of the runs.
    """
    listed = _seen_by_git(folder)
    if listed is None:
        listed = [path for path in folder.rglob("*") if _belongs(path.relative_to(folder))]
    files = {
        path
        for path in listed
        if path.is_file() and not any(path.is_relative_to(other) for other in without)
    }
    for path in named:
        files |= {path} if path.is_file() else {p for p in path.rglob("*") if p.is_file()}
    return sorted(files)


def write_archive(archive: Path, folder: Path, files: Sequence[Path]) -> None:
    """A zip of the files by their place in the folder; equal files give equal archives."""
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > MAX_UPLOAD_BYTES:
        largest = sorted(files, key=lambda path: -sizes[path])[:NUM_SHOWN]
        shown = "".join(f"\n  {sizes[p] >> 20:6} MiB  {p.relative_to(folder)}" for p in largest)
        raise UserError(
            f"{folder} has {sum(sizes.values()) >> 20} MiB to upload, at most "
            f"{MAX_UPLOAD_BYTES >> 20} MiB can be; put models and data on a path that all nodes "
            f"share, and let .gitignore name what the job does not need. The largest:{shown}"
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in files:
            # Without a time of its own, so that an unchanged folder is not uploaded again.
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (path.stat().st_mode & 0o777) << 16
            target.writestr(entry, path.read_bytes())


def _seen_by_git(folder: Path) -> list[Path] | None:
    """Tracked files and new ones that are not ignored; None: the folder is in no repository."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if done.returncode != 0:
        return None
    return [folder / name for name in done.stdout.split("\0") if name]


def _belongs(relative: Path) -> bool:
    return not any(
        part in EXCLUDED_FOLDERS or part.endswith((".egg-info", "_cache"))
        for part in relative.parts
    )
