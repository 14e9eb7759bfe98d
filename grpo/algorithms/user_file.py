"""Algorithms by name: the members of the family, and the user's own from a file (`FILE.py:NAME`).

A user's file makes its algorithm with `algorithm(...)` out of our functions and theirs. It is
checked as soon as it is loaded; what needs numbers is tried by a dry run before launch. Refuses to
know recipes.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pickle
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from grpo.algorithms import ALGORITHMS
from grpo.algorithms.algorithm import Algorithm, Certainty, Kind
from grpo.algorithms.options import with_knobs, with_objective_knobs
from grpo.config import AlgorithmConfig
from grpo.errors import CoveyError, UserError
from grpo.objective import Objective
from grpo.pipeline import Pipeline

Function = Callable[..., object]

# Positional arguments of the functions at each point; a point that is a record holds functions of
# its own, which the dry run calls.
_PIPELINE_ARGUMENTS = {
    "skip": 2,
    "plan": 2,
    "spans": 2,
    "select": 2,
    "rewards": 2,
    "advantage": 2,
    "trained": 2,
    "token_weight": 2,
    "loss_weight": 2,
    "aggregation": 1,
    "metrics": 2,
    "adapt": 3,
}
_OBJECTIVE_ARGUMENTS = {"log_ratio": 1, "surrogate": 2, "gates": 1, "group_term": 1}


def algorithm(
    *,
    config: type[AlgorithmConfig],
    pipeline: Callable[..., Pipeline],
    objective: Callable[..., Objective],
    title: str = "",
    paper: str = "",
    kind: Kind = "loss",
    certainty: Certainty = "reconstructed",
) -> Algorithm:
    """What a user's file assigns to NAME: settings and the two halves, as in our own files.

    `pipeline(config, *, outcomes, max_completion_length)` and `objective(config)` are built from
    the settings alone. The name is the file's: the recipe writes `algorithm: my_file.py:NAME`.
    """
    return Algorithm(
        name="",
        title=title,
        paper=paper,
        kind=kind,
        certainty=certainty,
        config=config,
        pipeline=pipeline,
        objective=objective,
    )


def is_file_name(name: str) -> bool:
    """Whether a recipe's algorithm is a user's own: `my_file.py:my_algorithm`."""
    return name.rpartition(":")[0].endswith(".py")


def found_algorithm(name: str) -> Algorithm:
    """The member of that name, or the user's own; UserError with the remedy."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if is_file_name(name):
        file = Path(name.rpartition(":")[0]).expanduser()
        if not file.is_file():
            raise UserError(_no_file(file))
        return _from_file(name, file.resolve(), file.stat().st_mtime_ns)
    close = difflib.get_close_matches(name, ALGORITHMS, n=1)
    remedy = f"did you mean {close[0]}?" if close else "expected one of these:"
    raise UserError(
        f"unknown algorithm {name!r}; {remedy} ({', '.join(ALGORITHMS)}), or your own as "
        "my_file.py:name"
    )


def composition_problems(pipeline: object, objective: object) -> Iterator[str]:
    """What is wrong with the two halves that can be told without a number."""
    if not isinstance(pipeline, Pipeline):
        yield f"pipeline(...) returned {type(pipeline).__name__}; expected grpo.pipeline.Pipeline"
    else:
        yield from _point_problems("pipeline", pipeline, _PIPELINE_ARGUMENTS)
    if not isinstance(objective, Objective):
        yield f"objective(...) returned {type(objective).__name__}; expected Objective"
    else:
        yield from _point_problems("objective", objective, _OBJECTIVE_ARGUMENTS)
        for penalty in objective.penalties:
            yield from _function_problems("objective.penalties", penalty.fn, 1)
        for measure in objective.measures:
            yield from _function_problems("objective.measures", measure.fn, 2)


def theirs_is_told(name: str, what: str) -> AbstractContextManager[None]:
    """Whatever a user's own file raises is told with its line; a member's errors are ours."""
    if not is_file_name(name):
        return nullcontext()
    file = Path(name.rpartition(":")[0]).expanduser().resolve()
    return errors_told(file, f"{name} {what}")


@contextmanager
def errors_told(file: Path, what: str, hint: str = "") -> Iterator[None]:
    """The boundary to a user's own code, which may raise anything: a UserError with its line."""
    try:
        yield
    except CoveyError:
        raise
    except Exception as error:
        said = f"{what} ({_place(file, error)}): {type(error).__name__}: {error}"
        raise UserError(f"{said}{hint}") from error


def _place(file: Path, error: Exception) -> str:
    """Where in the user's file it happened, else in which function."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == str(file)]
    return f"{file.name}, line {theirs[-1].lineno}" if theirs else frames[-1].name


@cache
def _from_file(name: str, file: Path, changed_ns: int) -> Algorithm:
    """Loaded once for each state of the file, so that its Config stays one class."""
    attribute = name.rpartition(":")[2]
    module = _module(file)
    found = vars(module).get(attribute)
    if not isinstance(found, Algorithm):
        known = [key for key, value in vars(module).items() if isinstance(value, Algorithm)]
        close = difflib.get_close_matches(attribute, known, n=1) or known[:1]
        remedy = f"did you mean {close[0]!r}?" if close else _HOW
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise UserError(f"algorithm {name}: found {what} of that name in {file.name}; {remedy}")
    loaded = replace(found, name=name, title=found.title or attribute)
    _require_settings(loaded)
    return replace(
        loaded,
        pipeline=partial(with_knobs, loaded.pipeline),
        objective=partial(with_objective_knobs, loaded.objective),
    )


_HOW = "assign it as NAME = algorithm(config=..., pipeline=..., objective=...)"


def _require_settings(loaded: Algorithm) -> None:
    """The schema extends ours, and every setting but those of the family has a default."""
    config = loaded.config
    if not (isinstance(config, type) and issubclass(config, AlgorithmConfig)):
        raise UserError(
            f"algorithm {loaded.name}: config is {config!r}; expected a class that extends "
            "grpo.config.AlgorithmConfig or one of grpo.algorithms.options"
        )
    without = [key for key, field in config.model_fields.items() if field.is_required()]
    if without:
        raise UserError(
            f"algorithm {loaded.name}: the settings {', '.join(without)} have no default; give "
            "each a Field(default, description=...)"
        )
    for half in ("pipeline", "objective"):
        function = getattr(loaded, half)
        if not callable(function):
            raise UserError(f"algorithm {loaded.name}: {half} is {function!r}; expected a function")


def _point_problems(
    half: str, record: Pipeline | Objective, num_arguments: dict[str, int]
) -> Iterator[str]:
    for point, count in num_arguments.items():
        value = getattr(record, point)
        functions = value if isinstance(value, tuple) else (value,)
        for function in functions:
            if function is not None:
                yield from _function_problems(f"{half}.{point}", function, count)


def _function_problems(point: str, function: object, count: int) -> Iterator[str]:
    """It can be called, printed and pickled."""
    if not callable(function):
        yield f"{point} holds {function!r}; expected a function, or a partial of one"
        return
    inner: object = function
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", repr(inner))
    if "<" in name:
        yield (
            f"{point} holds {name}, which can neither be printed nor sent to another process: make "
            "it a function of the module, and bind its settings with functools.partial"
        )
        return
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        yield (
            f"{point}: {name} cannot be called with the {count} argument"
            f"{'s' if count > 1 else ''} of this point ({error}); see "
            f"grpo/{point.partition('.')[0]}.py"
        )
        return
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        yield f"{point}: {name} cannot be pickled ({error}): bind plain values only"


def _module(file: Path) -> ModuleType:
    # Files of one name in two folders are two modules.
    name = f"covey_user_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle and pydantic look their module up by name
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that the file can import its neighbours
    with errors_told(file, f"algorithm file {file} could not be loaded"):
        spec.loader.exec_module(module)
    return module


def _no_file(file: Path) -> str:
    folder = file.parent
    beside = sorted(path.name for path in folder.glob("*.py")) if folder.is_dir() else []
    close = difflib.get_close_matches(file.name, beside, n=1)
    remedy = f"did you mean {folder / close[0]}?" if close else "check the path"
    return f"algorithm file {file}: not found; {remedy}"
