"""The recipe as a JSON Schema for editors, with the algorithms told apart by their name."""

from __future__ import annotations

from typing import Any

from grpo.algorithms import ALGORITHMS, Algorithm
from orchestration.recipe import Recipe

JsonSchema = dict[str, Any]


def recipe_schema() -> JsonSchema:
    """What load_recipe accepts under covey's own names; aliases are left out on purpose."""
    schema: JsonSchema = Recipe.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "covey recipe"
    schema["$defs"].pop("AlgorithmChoice")
    schema["$defs"].pop("AlgorithmConfig")
    schema["properties"]["algorithm"] = {
        "oneOf": [_algorithm_schema(algorithm) for algorithm in ALGORITHMS.values()]
    }
    return schema


def _algorithm_schema(algorithm: Algorithm) -> JsonSchema:
    """Its own settings beside `name: <its name>`."""
    schema: JsonSchema = algorithm.config.model_json_schema()
    schema["title"] = algorithm.title
    schema["description"] = f"{algorithm.title}, {algorithm.paper}"
    schema["properties"] = {"name": {"const": algorithm.name}, **schema["properties"]}
    schema["required"] = ["name", *schema.get("required", [])]
    return schema
