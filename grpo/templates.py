"""Prompts made from a template, which is text with {names}. Refuses to know what they stand for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_FIELD = re.compile(r"\{(\w+)\}")


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each {name} replaced by its value; braces within a value stay.

    "{a} then {b}", a "{b}", b "2": "{b} then 2".
    """
    return _FIELD.sub(lambda found: values.get(found[1], found[0]), template)


def require_fields(template: str, fields: Collection[str], *, setting: str) -> str:
    """The template, if it has each of these fields; ValueError names those that it lacks."""
    present = set(_FIELD.findall(template))
    missing = [f"{{{name}}}" for name in fields if name not in present]
    if missing:
        raise ValueError(
            f"{setting} is {template!r}, which lacks {' and '.join(missing)}: write it where its "
            "text belongs"
        )
    return template
