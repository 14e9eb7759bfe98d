"""A run by the path or name that a user gives, and the recipe that it began with.

Refuses to know what is in its records.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from grpo.errors import UserError
from orchestration.recipe import Recipe
from orchestration.run_directory import CONFIG_FILE
from orchestration.yaml_source import read_yaml


def found_run(argument: str) -> Path:
    """The folder of a run by its path, or by its name in ./runs."""
    named = [Path(argument), Path("runs") / argument]
    for path in named:
        if (path / CONFIG_FILE).is_file():
            return path.resolve()
    if not any(path.exists() for path in named):
        raise UserError(f"{argument}: there is no such run; expected the folder of a run")
    raise UserError(f"{argument} is no run folder: it holds no {CONFIG_FILE}")


def recipe_of_run(run: Path) -> Recipe:
    """The recipe that the run began with; its data need not be there any more."""
    try:
        return Recipe.model_validate(read_yaml(run / CONFIG_FILE).data)
    except ValidationError as error:
        raise UserError(
            f"{run / CONFIG_FILE} is no recipe for this version of covey: {error}\n"
            "use the version that wrote it (see versions.json of the run)"
        ) from error
