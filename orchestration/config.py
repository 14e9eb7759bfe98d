"""From a recipe file and --set overrides to a Recipe, or to one message with everything wrong.

Refuses to know what the settings mean: recipe.py does.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from grpo.algorithms import ALGORITHMS
from grpo.algorithms.user_file import found_algorithm
from grpo.config import AlgorithmConfig
from grpo.errors import UserError
from orchestration.aliases import targets_of, with_listed_sets
from orchestration.data_config import DataConfig
from orchestration.recipe import (
    AlarmConfig,
    AlgorithmChoice,
    CheckpointConfig,
    EvaluationConfig,
    Recipe,
    SamplingConfig,
    Tracker,
)
from orchestration.recipe_paths import REPOSITORY, resolve_paths
from orchestration.settings import all_settings, described, is_setting
from orchestration.yaml_source import parsed_scalar, read_yaml

__all__ = [
    "AlarmConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoadedRecipe",
    "Recipe",
    "SamplingConfig",
    "Tracker",
    "load_recipe",
    "parsed_algorithm",
    "read_recipe",
]

Data = dict[str, Any]  # plain YAML: mappings, lists and scalars to any depth
Places = dict[str, str]  # where each setting was written: "line 3" or "--set steps=4"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRecipe:
    """A recipe and what its author should be told once."""

    recipe: Recipe
    path: Path
    notices: tuple[str, ...]  # settings that were written under another project's name


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `a.b=c` overrides; UserError with every problem."""
    return read_recipe(path, overrides).recipe


def read_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, needs_files: bool = True
) -> LoadedRecipe:
    """The same, together with what its author should be told.

    Without `needs_files` its model and data may be elsewhere.
    """
    file = found_recipe(Path(path))
    source = read_yaml(file)
    places = {path: f"line {line}" for path, line in source.lines.items()}
    problems = [f"{_place(places, p)}{p}: given twice; remove one" for p in source.duplicates]
    data, notices = _without_aliases(source.data, problems, places)
    for override in overrides:
        _apply(override, data, notices, problems, places)
    folders = (Path.cwd(), file.parent, REPOSITORY)
    missing = [f"{_place(places, at)}{at}: {why}" for at, why in resolve_paths(data, folders)]
    problems += missing if needs_files else []
    recipe = _validated(data, places, problems)
    if recipe is None or problems:
        raise UserError(_message(file, problems))
    return LoadedRecipe(recipe=recipe, path=file, notices=tuple(dict.fromkeys(notices)))


def parsed_algorithm(name: str, overrides: Sequence[str]) -> AlgorithmConfig:
    """The settings of an algorithm without a recipe; `beta=0.1` and `algorithm.beta=0.1` alike."""
    data: Data = {"algorithm": {"name": name}}
    problems: list[str] = []
    for override in overrides:
        if override.partition("=")[0].strip() in ("name", "algorithm.name"):
            problems.append(f"--set {override}: the algorithm is {name}; name another in its place")
            continue
        path = override if override.startswith("algorithm.") else f"algorithm.{override}"
        _apply(path, data, [], problems, {})
    choice = _algorithm(data, {}, problems)
    if choice is None or problems:
        raise UserError("\n".join(problems))
    return choice.settings


def found_recipe(path: Path) -> Path:
    """The file itself, or the recipe of that name that ships with covey."""
    shipped = REPOSITORY / "recipes"
    for candidate in (path, shipped / path.name, shipped / f"{path.name}.yaml"):
        if candidate.is_file() and (candidate == path or path.parent == Path()):
            return candidate.resolve()
    if path.is_dir():
        raise UserError(f"recipe {path}: found a folder; expected a YAML file")
    nearby = [p for folder in (path.parent, shipped) for p in sorted(folder.glob("*.yaml"))]
    names = {p.stem: p for p in nearby}
    close = difflib.get_close_matches(path.stem, names, n=1)
    remedy = f"did you mean {names[close[0]]}?" if close else f"found: {', '.join(names) or 'none'}"
    raise UserError(f"recipe {path}: no such file; {remedy}")


def _without_aliases(data: Data, problems: list[str], places: Places) -> tuple[Data, list[str]]:
    """The same settings under covey's names."""
    data, has_weights = with_listed_sets(data, problems)
    renamed = copy.deepcopy(data)
    if isinstance(renamed.get("algorithm"), str):
        renamed["algorithm"] = {"name": renamed["algorithm"]}
    notices = ["prompt_data_probs is read as data.train.*.weight"] if has_weights else []
    sections = [(), *((k,) for k, v in data.items() if isinstance(v, dict))]
    for section in sections:
        inside = data if not section else data[section[0]]
        for key in inside:
            path = ".".join((*section, str(key)))
            targets = () if is_setting(path, renamed) else targets_of(path)
            if not targets:
                continue
            value = _removed(renamed, path)
            for target, part in _parts(path, targets, value, problems):
                if _exists(renamed, target):
                    where = _place(places, path)
                    problems.append(f"{where}{path} is {target}, which is given too; remove one")
                else:
                    _put(renamed, target, part)
                    notices.append(f"{path} is read as {target}")
    for key in [k for k, v in renamed.items() if v == {} and k not in Recipe.model_fields]:
        del renamed[key]  # a section of another project, every setting of which has moved
    return renamed, notices


def _parts(
    path: str, targets: tuple[str, ...], value: object, problems: list[str]
) -> list[tuple[str, object]]:
    if len(targets) == 1:
        return [(targets[0], value)]
    if not isinstance(value, list) or len(value) != len(targets):
        problems.append(f"{path}: found {value!r}; expected {len(targets)} values, as [0.2, 0.28]")
        return []
    return list(zip(targets, value, strict=True))


def _apply(
    override: str, data: Data, notices: list[str], problems: list[str], places: Places
) -> None:
    """One --set a.b=c."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        problems.append(f"--set {override}: expected NAME=VALUE, for example learner.ranks=2")
        return
    value = parsed_scalar(text)
    if path == "algorithm" and isinstance(value, str):
        value = {"name": value}
    targets = () if is_setting(path, data) else targets_of(path)
    for target, part in _parts(path, targets or (path,), value, problems):
        try:
            _put(data, target, part)
            places[target] = f"--set {override}"
        except (IndexError, ValueError, TypeError):
            problems.append(f"--set {override}: the recipe has nothing at {target}")
        if target != path:
            notices.append(f"{path} is read as {target}")


def _validated(data: Data, places: Places, problems: list[str]) -> Recipe | None:
    choice = _algorithm(data, places, problems)
    stand_in = AlgorithmChoice(name="grpo", settings=ALGORITHMS["grpo"].config())
    try:
        return Recipe.model_validate({**data, "algorithm": choice or stand_in})
    except ValidationError as error:
        for detail in error.errors():
            loc = tuple(str(part) for part in detail["loc"])
            # Combinations with a stand-in mean nothing.
            if loc or choice is not None:
                problems += _described_at(loc, cast(Data, detail), data, places)
        return None


def _algorithm(data: Data, places: Places, problems: list[str]) -> AlgorithmChoice | None:
    """Validated apart from the rest, because its schema depends on its name."""
    section = data.get("algorithm", None)
    where = _place(places, "algorithm")
    if not isinstance(section, dict) or "name" not in section:
        problems.append(
            f"{where}algorithm: found {section!r}; expected a name and its settings, for example "
            "{name: grpo, num_generations: 8}"
        )
        return None
    name = section["name"]
    try:
        algorithm = found_algorithm(str(name))
    except UserError as error:
        problems.append(f"{_place(places, 'algorithm.name')}algorithm.name: {error}")
        return None
    rest = {k: v for k, v in section.items() if k != "name"}
    try:
        return AlgorithmChoice(name=name, settings=algorithm.config.model_validate(rest))
    except ValidationError as error:
        for detail in error.errors():
            loc = ("algorithm", *(str(part) for part in detail["loc"]))
            problems += _described_at(loc, cast(Data, detail), data, places)
        return None


def _described_at(loc: tuple[str, ...], detail: Data, data: Data, places: Places) -> list[str]:
    path = ".".join(loc)
    where = _place(places, path)
    return [f"{where}{line}" for line in described(path, detail, all_settings(data))]


def _place(places: Places, path: str) -> str:
    """Where a setting was written, or the nearest section that was; empty: nowhere."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        dotted = ".".join(parts[:length])
        if dotted in places:
            return f"{places[dotted]}: "
    return ""


def _message(file: Path, problems: list[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return f"{file.name}: {unique[0]}"
    return "\n".join([f"{file.name} has {len(unique)} problems:", *(f"  {p}" for p in unique)])


def _exists(data: Data, path: str) -> bool:
    inner: object = data
    for part in path.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True


def _put(data: Data, path: str, value: object) -> None:
    *sections, key = path.split(".")
    inner: Any = data
    for part in sections:
        if isinstance(inner, list):
            inner = inner[int(part)]
        else:
            if part not in inner or inner[part] is None:
                inner[part] = {}
            inner = inner[part]
    if isinstance(inner, list):
        inner[int(key)] = value
    else:
        inner[key] = value


def _removed(data: Data, path: str) -> object:
    *sections, key = path.split(".")
    for part in sections:
        data = data[part]
    return data.pop(key)
