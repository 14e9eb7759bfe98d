"""A YAML file as plain data, with the line of every setting for messages. Knows no schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from grpo.errors import UserError

Path_ = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text; everybody means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlSource:
    """The mapping of a file; `lines` has the line of every dotted path."""

    data: dict[str, object]
    lines: Mapping[str, int]
    duplicates: tuple[str, ...]  # dotted paths given twice, which YAML would pass over in silence


def read_yaml(path: Path) -> YamlSource:
    """The file as a mapping; anything else is a UserError with the place."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        what = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise UserError(f"{path}{place}: this is no valid YAML: {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is no text file in UTF-8: {error.reason}") from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: found {type(data).__name__} at the top; expected settings such as 'steps: 60'"
        )
    lines: dict[str, int] = {}
    duplicates: list[str] = []
    _note_lines(node, (), lines, duplicates)
    return YamlSource(
        data=cast("dict[str, object]", data), lines=lines, duplicates=tuple(duplicates)
    )


def parsed_scalar(text: str) -> object:
    """The value that the text has in YAML: 1e-4 is a number, null is None, [a, b] is a list."""
    try:
        return cast(object, yaml.load(text, Loader=_Loader))  # a SafeLoader
    except yaml.YAMLError:
        return text


def _note_lines(
    node: yaml.Node | None, path: Path_, lines: dict[str, int], duplicates: list[str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            dotted = ".".join(inner)
            if dotted in lines:
                duplicates.append(dotted)
            lines[dotted] = key.start_mark.line + 1
            _note_lines(value, inner, lines, duplicates)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            inner = (*path, str(i))
            lines[".".join(inner)] = value.start_mark.line + 1
            _note_lines(value, inner, lines, duplicates)
