"""Every setting that a recipe can have is read by some code: none is accepted and ignored."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestration.config  # noqa: F401  # defines every section of a recipe
from grpo.algorithms import ALGORITHMS
from grpo.config import Schema

ROOT = Path(__file__).parents[2]
PACKAGES = ("grpo", "rollout_workers", "learner", "reward_services", "orchestration")


def names_read(packages: tuple[str, ...]) -> frozenset[str]:
    """Attributes that are read, and texts that index something, anywhere in these packages."""
    found: set[str] = set()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
                elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                    found.add(str(node.slice.value))
    return frozenset(found)


def schemas(kind: type[Schema] = Schema) -> Iterator[type[Schema]]:
    """Every section that exists, whichever module defines it."""
    for section in kind.__subclasses__():
        if section.__module__.startswith(PACKAGES):
            yield section
        yield from schemas(section)


NAMES_READ = names_read(PACKAGES)
READ_BY_ALGORITHMS = names_read(("grpo",))


@pytest.mark.parametrize("name", sorted({f"{s.__module__}.{s.__qualname__}" for s in schemas()}))
def test_no_setting_is_accepted_and_ignored(name: str) -> None:
    (section,) = {s for s in schemas() if f"{s.__module__}.{s.__qualname__}" == name}
    assert [field for field in section.model_fields if field not in NAMES_READ] == []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_of_an_algorithm_is_read_where_algorithms_are(name: str) -> None:
    assert set(ALGORITHMS[name].config.model_fields) <= READ_BY_ALGORITHMS | {"num_generations"}
