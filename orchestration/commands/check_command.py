"""`covey check`: every problem of a recipe at once."""

from __future__ import annotations

from collections.abc import Sequence

from orchestration.commands.arguments import parsed, recipe_parser
from orchestration.commands.output import remark, say


def run(arguments: Sequence[str]) -> int:
    """0: the recipe can run here; 2: it cannot."""
    parser = recipe_parser("check", "Find every problem of a recipe before it runs.")
    parser.add_argument("--local", action="store_true", help="for a run without Ray")
    options = parsed(parser, arguments)

    from orchestration.check import checked
    from orchestration.config import read_recipe

    loaded = read_recipe(options.recipe, options.set)
    say(f"ok       recipe          {loaded.path}")
    for notice in loaded.notices:
        say(f"ok       recipe          {notice}")
    problems = 0
    for finding in checked(loaded.recipe, local=options.local):
        say(finding.line())
        problems += not finding.ok
    if problems:
        remark(f"covey: {problems} problem{'s' if problems > 1 else ''}, see above")
    return 2 if problems else 0
