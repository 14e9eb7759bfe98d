"""`covey describe`: what stands at each point of an algorithm."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from orchestration.commands.arguments import parsed
from orchestration.commands.output import say, say_rows

# A pipeline needs the reward's parts and a token budget; these stand for a recipe's own.
SCORER, MAX_COMPLETION_LENGTH = "answer", 512


def run(arguments: Sequence[str]) -> int:
    """The functions of the two halves in the order they run, then the settings."""
    parser = argparse.ArgumentParser(prog="covey describe", description="Describe an algorithm.")
    parser.add_argument("algorithm", metavar="ALGORITHM", help="a name, FILE.py:NAME, or a recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A=B",
        help="a setting: --set beta=0.1",
    )
    options = parsed(parser, arguments)

    from grpo.describe import described
    from orchestration.chosen_algorithm import chosen_algorithm

    chosen = chosen_algorithm(options.algorithm, options.set)
    algorithm, settings, recipe = chosen.algorithm, chosen.settings, chosen.recipe
    say(f"{algorithm.title}  ({', '.join(filter(None, (algorithm.name, algorithm.paper)))})")
    budget = recipe.sampling.max_completion_length if recipe else MAX_COMPLETION_LENGTH
    outcomes = recipe.weights if recipe else {SCORER: 1.0}
    pipeline = algorithm.pipeline(settings, outcomes=outcomes, max_completion_length=budget)
    rows = [
        (point if i == 0 else "", line)
        for point, lines in described(pipeline, algorithm.objective(settings))
        for i, line in enumerate(lines or ["-"])
    ]
    say_rows(rows, indent="  ")
    say("settings")
    fields = type(settings).model_fields
    say_rows(
        [
            (name, f"{value}", fields[name].description or "")
            for name, value in settings.model_dump(mode="json").items()
        ],
        indent="  ",
    )
    return 0
