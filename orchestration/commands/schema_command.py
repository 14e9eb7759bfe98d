"""`covey schema`: the JSON Schemas of recipes and of groups."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from orchestration.commands.output import say


def run(arguments: Sequence[str]) -> int:
    """Print a schema; an editor then completes and checks a file while it is written."""
    parser = argparse.ArgumentParser(
        prog="covey schema",
        description="Print a JSON Schema. Save that of recipes as recipe.schema.json and begin a "
        "recipe with: # yaml-language-server: $schema=recipe.schema.json",
    )
    parser.add_argument(
        "of",
        nargs="?",
        choices=("recipe", "group"),
        default="recipe",
        help="recipe (default), or group: what `covey explain` reads",
    )
    options = parser.parse_args(arguments)

    from orchestration.schema_export import group_schema, recipe_schema

    say(json.dumps(group_schema() if options.of == "group" else recipe_schema(), indent=2))
    return 0
