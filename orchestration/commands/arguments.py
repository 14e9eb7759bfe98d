"""What several commands accept: a recipe, and overrides of its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

RECIPE_HELP = "a YAML file, or the name of a recipe that ships with covey (quickstart)"
SET_HELP = "override a setting: --set learner.learning_rate=1e-5 (or --learner.learning_rate 1e-5)"


def recipe_parser(name: str, summary: str) -> argparse.ArgumentParser:
    """A parser with RECIPE and --set."""
    parser = argparse.ArgumentParser(prog=f"covey {name}", description=summary)
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    add_overrides(parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set, as often as wanted."""
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help=SET_HELP)


def not_negative(text: str) -> int:
    """A whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"found {number}; expected 0 or more")
    return number


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `--a.b c` and `--a.b=c`, which other projects use, are overrides too."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            words.append(word)
            continue
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                parser.error(f"{word} needs a value: {word}=VALUE")
        words += ["--set", f"{name.removeprefix('--')}={value}"]
    return parser.parse_args(words)
