"""The algorithm that a command line names: a member, a user's own, or that of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo.algorithms.algorithm import Algorithm
from grpo.algorithms.user_file import found_algorithm
from grpo.config import AlgorithmConfig
from orchestration.config import load_recipe, parsed_algorithm
from orchestration.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An algorithm with its settings."""

    algorithm: Algorithm
    settings: AlgorithmConfig
    recipe: Recipe | None  # None: it was named alone


def chosen_algorithm(name: str, overrides: Sequence[str]) -> Chosen:
    """By name with its defaults, or as a recipe sets it; UserError with the remedy."""
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(name, overrides)
        choice = recipe.algorithm
        return Chosen(algorithm=choice.algorithm, settings=choice.settings, recipe=recipe)
    algorithm = found_algorithm(name)
    return Chosen(algorithm=algorithm, settings=parsed_algorithm(name, overrides), recipe=None)
