"""The files that a recipe names, found from wherever it was started. Looks, never opens."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.data_config import DATA_SUFFIXES

REPOSITORY = Path(__file__).resolve().parents[1]
STARTER_DATA = ("data", "starter")
_MODELS_OF_SCORERS = {"process_reward": ("model",), "implicit_reward": ("model", "reference")}
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w.-]+)?")


def resolve_paths(data: dict[str, Any], folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Make every file of a recipe absolute, in place; returns (setting, problem) of those missing.

    A relative path is looked for in the folders, in order.
    """
    problems: list[tuple[str, str]] = []
    _resolve(data, "model", "model", folders, problems)
    section = data.get("data")
    if isinstance(section, dict):
        for key in ("train", "evaluation"):
            _resolve_sets(section, key, folders, problems)
    algorithm = data.get("algorithm")
    if isinstance(algorithm, dict):
        _resolve_function(algorithm, "name", "algorithm.name", folders, problems)
    scorers = data.get("scorers")
    for i, scorer in enumerate(scorers if isinstance(scorers, list) else ()):
        if isinstance(scorer, dict):
            _resolve_function(scorer, "function", f"scorers.{i}.function", folders, problems)
            _resolve_judge(scorer.get("judge"), folders)
            preference = scorer.get("preference")
            if isinstance(preference, dict):
                _resolve_made_folder(preference, folders)
                _resolve(
                    preference, "encoder", f"scorers.{i}.preference.encoder", folders, problems
                )
            for judge, keys in _MODELS_OF_SCORERS.items():
                if isinstance(model := scorer.get(judge), dict):
                    for key in keys:
                        _resolve(model, key, f"scorers.{i}.{judge}.{key}", folders, problems)
    return problems


def _resolve(
    section: dict[str, Any],
    key: str,
    path: str,
    folders: Sequence[Path],
    problems: list[tuple[str, str]],
) -> None:
    value = section.get(key)
    if not isinstance(value, str):
        return  # missing or of another type: the schema says so
    found = _found(value, folders)
    if found is not None:
        section[key] = str(found)
    elif not _may_be_hub_id(value, folders):
        problems.append((path, f"found no {value!r}; {_remedy(value, folders)}"))


def _resolve_sets(
    section: dict[str, Any], key: str, folders: Sequence[Path], problems: list[tuple[str, str]]
) -> None:
    """One data set, or each of several: a source alone, or a mapping with one."""
    _resolve(section, key, f"data.{key}", folders, problems)
    value = section.get(key)
    if isinstance(value, dict):
        section[key] = value = [value]
    if isinstance(value, list):
        section[key] = sets = [{"source": v} if isinstance(v, str) else v for v in value]
        for i, item in enumerate(sets):
            if isinstance(item, dict):
                _resolve(item, "source", f"data.{key}.{i}", folders, problems)


def _resolve_function(
    section: dict[str, Any],
    key: str,
    path: str,
    folders: Sequence[Path],
    problems: list[tuple[str, str]],
) -> None:
    value = section.get(key)
    if not isinstance(value, str):
        return
    file, _, name = value.rpartition(":")
    if not file.endswith(".py"):
        return  # a module, a member of the family, or a form that the schema refuses
    found = _found(file, folders)
    if found is None:
        problems.append((path, f"found no {file!r}; {_remedy(file, folders)}"))
    else:
        section[key] = f"{found}:{name}"


def _resolve_made_folder(section: dict[str, Any], folders: Sequence[Path]) -> None:
    """A folder that covey itself makes: where it is, else in the first folder."""
    if isinstance(value := section.get("folder"), str):
        path = folders[0] / Path(value).expanduser()
        section["folder"] = str(_found(value, folders) or path.resolve())


def _resolve_judge(judge: object, folders: Sequence[Path]) -> None:
    """`covey judge train` may still have to make the folder of a judge's model; a name of the
    hub stays as it is."""
    model = judge.get("model") if isinstance(judge, dict) else None
    value = model.get("path") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(value, str):
        found = _found(value, folders)
        if found is not None or value.startswith((".", "/", "~")):
            model["path"] = str(found or (folders[0] / Path(value).expanduser()).resolve())


def _found(value: str, folders: Sequence[Path]) -> Path | None:
    path = Path(value).expanduser()
    return next((p.resolve() for folder in folders if (p := folder / path).exists()), None)


def _may_be_hub_id(value: str, folders: Sequence[Path]) -> bool:
    """`Qwen/Qwen3-0.6B` may; `models/mine` beside a folder `models` is meant as a path."""
    first, slash, _ = value.partition("/")
    is_path = bool(slash) and any((folder / first).is_dir() for folder in folders)
    return (
        not is_path
        and _HUB_ID.fullmatch(value) is not None
        and Path(value).suffix not in DATA_SUFFIXES
    )


def _remedy(value: str, folders: Sequence[Path]) -> str:
    for folder in folders:
        parent = (folder / value).parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        if close := difflib.get_close_matches(Path(value).name, names, n=1):
            return f"did you mean {Path(value).parent / close[0]}?"
    if Path(value).parts[:2] == STARTER_DATA:
        return "write the starter's data first: covey starter data"
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    return f"looked in {looked}"
