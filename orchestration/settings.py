"""The settings of a recipe by dotted path, and what is wrong with one in words.

Reads the schema; refuses to know YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from grpo.algorithms import ALGORITHMS
from grpo.algorithms.user_file import found_algorithm
from grpo.errors import UserError
from orchestration.recipe import Recipe


def all_settings(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Every dotted path that a recipe with this algorithm may set; `*` stands for a list index."""
    section = data.get("algorithm", None)
    name = section["name"] if isinstance(section, dict) and "name" in section else None
    try:
        chosen = [found_algorithm(str(name))]
    except UserError:  # reported where the algorithm is read
        chosen = []
    algorithms = chosen or list(ALGORITHMS.values())
    own = {f"algorithm.{key}": None for a in algorithms for key in a.config.model_fields}
    rest = [p for p in _paths(Recipe, ()) if not p.startswith("algorithm.")]
    return (*rest, "algorithm.name", *own)


def is_setting(path: str, data: Mapping[str, Any]) -> bool:
    """Whether covey itself knows this path."""
    return _starred(path) in all_settings(data)


MAX_SHOWN = 300  # characters of a value in a message


def paths_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Every dotted path of a schema; `*` stands for a list index."""
    return tuple(_paths(model, ()))


def described(path: str, detail: Mapping[str, Any], settings: Sequence[str]) -> list[str]:
    """A validation error in words: found, expected, remedy."""
    kind, found = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return [f"{path}: unknown setting; {_suggestion(path, settings)}"]
    if kind == "missing":
        return [f"{path}: missing; it has no default, so it must be set"]
    if kind == "value_error":
        lines = str(detail["ctx"]["error"]).split("\n")
        return [f"{path}: {line}" if path else line for line in lines]
    return [f"{path}: found {shown(found)}; {_expected(detail['msg'])}"]


def shown(found: object) -> str:
    """A value as its author wrote it, cut off where nobody would read on."""
    text = repr(found)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _suggestion(path: str, settings: Sequence[str]) -> str:
    section, _, key = path.rpartition(".")
    same_section = [s for s in settings if s.rpartition(".")[0] == _starred(section)]
    keys = [s.rpartition(".")[2] for s in same_section]
    prefix = f"{section}." if section else ""
    if close := difflib.get_close_matches(key, keys, n=1):
        return f"did you mean {prefix}{close[0]}?"
    if elsewhere := [s for s in settings if s.rpartition(".")[2] == key]:
        return f"did you mean {min(elsewhere, key=lambda path: path.count('.'))}?"
    if not keys:
        return f"{section} is no section; `covey schema` lists all settings"
    return f"{section or 'a recipe'} has: {', '.join(keys)}"


def _expected(message: str) -> str:
    """pydantic's words, shortened to `expected ...`."""
    for start in ("Input should be ", "Input should "):
        if message.startswith(start):
            return f"expected {message.removeprefix(start)}"
    return message[:1].lower() + message[1:]


def _starred(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _paths(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[str]:
    for key, field in model.model_fields.items():
        path = (*prefix, key)
        yield ".".join(path)
        for inner, is_list in _models(field.annotation):
            yield from _paths(inner, (*path, "*") if is_list else path)


def _models(annotation: object, *, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The schemas inside an annotation, such as that of `tuple[ScorerConfig, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
    for inner in get_args(annotation):
        yield from _models(inner, is_list=is_list or Ellipsis in get_args(annotation))
