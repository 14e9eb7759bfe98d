"""Every name that the code asks torch for exists: on a CPU most of what is for GPUs never runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

ROOT = Path(__file__).parents[2]
FOLDERS = ("grpo", "rollout_workers", "learner", "reward_services", "benchmarks", "tests/gpu")
# Not in builds of torch without CUDA.
ONLY_WITH_CUDA = {"torch.distributed.ProcessGroupNCCL"}


def asked(path: Path) -> Iterator[str]:
    """Dotted names below torch, as a file writes them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in ("torch", "dist"):
            root = "torch" if node.id == "torch" else "torch.distributed"
            yield ".".join([root, *reversed(parts)])


def is_missing(name: str) -> bool:
    found: object = torch
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            return True
        found = getattr(found, part)
    return False


@pytest.mark.parametrize("folder", FOLDERS)
def test_torch_has_what_is_asked_of_it(folder: str) -> None:
    names = {name for path in (ROOT / folder).rglob("*.py") for name in asked(path)}
    assert names
    known = {n for n in names if not any(n.startswith(only) for only in ONLY_WITH_CUDA)}
    assert {name for name in known if is_missing(name)} == set()


def test_a_misspelt_name_shows(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("print(torch.cuda.getdevice_name(), torch.cuda.is_available())\n")
    assert {name for name in asked(file) if is_missing(name)} == {"torch.cuda.getdevice_name"}
