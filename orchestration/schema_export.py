"""JSON Schemas for editors: of recipes, with the algorithms told apart by name, and of groups."""

from __future__ import annotations

from typing import Any

from grpo.algorithms import ALGORITHMS, Algorithm
from orchestration.group_schema import BatchInput
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
        "oneOf": [*map(_algorithm_schema, ALGORITHMS.values()), _USER_ALGORITHM, _BY_NAME]
    }
    return schema


_FILE = {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$"}
_USER_ALGORITHM = {
    "type": "object",
    "title": "your own",
    "description": "FILE.py:NAME and the settings of its Config",
    "properties": {"name": _FILE},
    "required": ["name"],
}
_BY_NAME = {
    "title": "by name alone",
    "anyOf": [{"enum": list(ALGORITHMS)}, _FILE],
}


def group_schema() -> JsonSchema:
    """What `covey explain` reads: a group, a list of groups, or a batch with a state."""
    schema: JsonSchema = BatchInput.model_json_schema(mode="validation")
    batch = {key: schema.pop(key) for key in list(schema) if key != "$defs"}
    group = {"$ref": "#/$defs/GroupInput"}
    schema["$defs"]["BatchInput"] = batch
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "covey group",
        "description": "One group, a list of groups, or a batch. A file of JSON lines has one "
        "group on each line. The lines of a run's groups.jsonl are read, too.",
        "anyOf": [group, {"type": "array", "items": group}, {"$ref": "#/$defs/BatchInput"}],
        "$defs": schema["$defs"],
    }


def _algorithm_schema(algorithm: Algorithm) -> JsonSchema:
    """Its own settings beside `name: <its name>`."""
    schema: JsonSchema = algorithm.config.model_json_schema()
    schema["title"] = algorithm.title
    schema["description"] = f"{algorithm.title}, {algorithm.paper}"
    schema["properties"] = {"name": {"const": algorithm.name}, **schema["properties"]}
    schema["required"] = ["name", *schema.get("required", [])]
    return schema
