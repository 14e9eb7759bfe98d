"""`covey schema`: the JSON Schema of recipes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from orchestration.commands.output import say


def run(arguments: Sequence[str]) -> int:
    """Print the schema; an editor then completes and checks recipes while they are written."""
    parser = argparse.ArgumentParser(
        prog="covey schema",
        description="Print the JSON Schema of recipes. Save it as recipe.schema.json and begin a "
        "recipe with: # yaml-language-server: $schema=recipe.schema.json",
    )
    parser.parse_args(arguments)

    from orchestration.schema_export import recipe_schema

    say(json.dumps(recipe_schema(), indent=2))
    return 0
