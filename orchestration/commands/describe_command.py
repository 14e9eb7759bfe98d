"""`covey describe`: what stands at each point of an algorithm."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestration.commands.arguments import parsed
from orchestration.commands.output import say, say_rows

if TYPE_CHECKING:
    from grpo.algorithms import Algorithm
    from grpo.config import AlgorithmConfig

# A pipeline needs the reward's parts and a token budget; these stand for a recipe's own.
SCORER, MAX_COMPLETION_LENGTH = "answer", 512


def run(arguments: Sequence[str]) -> int:
    """The functions of the two halves in the order they run, then the settings."""
    parser = argparse.ArgumentParser(prog="covey describe", description="Describe an algorithm.")
    parser.add_argument("algorithm", metavar="ALGORITHM", help="a name, or a recipe file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A=B",
        help="a setting: --set beta=0.1",
    )
    options = parsed(parser, arguments)

    from grpo.describe import described

    algorithm, settings, outcomes, budget = _chosen(options.algorithm, options.set)
    say(f"{algorithm.title}  ({algorithm.name}, {algorithm.paper})")
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


def _chosen(
    name: str, overrides: Sequence[str]
) -> tuple[Algorithm, AlgorithmConfig, Mapping[str, float], int]:
    """By name with its defaults, or as a recipe sets it."""
    from grpo.algorithms import ALGORITHMS
    from grpo.errors import UserError
    from orchestration.config import load_recipe, parsed_algorithm

    if name in ALGORITHMS:
        algorithm = ALGORITHMS[name]
        return algorithm, parsed_algorithm(name, overrides), {SCORER: 1.0}, MAX_COMPLETION_LENGTH
    if not name.endswith((".yaml", ".yml")):
        close = difflib.get_close_matches(name, ALGORITHMS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"found: {', '.join(ALGORITHMS)}"
        raise UserError(f"unknown algorithm {name!r}; {remedy}")
    recipe = load_recipe(name, overrides)
    choice = recipe.algorithm
    budget = recipe.sampling.max_completion_length
    return choice.algorithm, choice.settings, recipe.weights, budget
