"""The user's own reward function: found by name, called in the signature it was written for.

Knows TRL's, OpenRLHF's and verl's conventions; knows nothing of processes, deadlines or groups.
What it returns becomes a verdict per completion: a number, not applicable, or a failure.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import cast

from grpo.errors import UserError
from grpo.types import Int32

Function = Callable[..., object]


# Beyond it float64 tells no 1 from a 2, and squares of a gradient overflow the learner's float32.
LARGEST_SCORE = 1e15
A_SCORE = f"a finite number between -{LARGEST_SCORE:g} and {LARGEST_SCORE:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one completion. Both None: the function does not apply here."""

    value: float | None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a function is asked to judge: parallel lists, one entry per completion."""

    prompts: list[object]  # as the data set has them: text or messages
    completions: list[object]  # text, or messages where the prompt was messages
    tokens: Int32  # of all completions, one after the other: one array travels faster than many
    num_tokens: list[int]
    prompt_texts: list[str]
    completion_texts: list[str]
    references: list[str | None]
    columns: dict[str, list[object]]  # every other column of the data set

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def completion_ids(self) -> list[list[int]]:
        """The tokens of each completion."""
        ids = iter(self.tokens.tolist())
        return [list(islice(ids, count)) for count in self.num_tokens]


# Verdicts on their way between processes: plain lists travel ten times faster than records.
PackedVerdicts = tuple[list[float | None], dict[int, str]]


def packed_verdicts(verdicts: Sequence[Verdict]) -> PackedVerdicts:
    """The values, and the failures by place."""
    failures = {i: v.failure for i, v in enumerate(verdicts) if v.failure is not None}
    return [verdict.value for verdict in verdicts], failures


def unpacked_verdicts(packed: PackedVerdicts) -> list[Verdict]:
    """What `packed_verdicts` packed."""
    values, failures = packed
    found = [Verdict(value=value) for value in values]
    for place, failure in failures.items():
        found[place] = Verdict(value=None, failure=failure)
    return found


def loaded_function(spec: str) -> Function:
    """The function that 'path.py:name' or 'module:name' names."""
    place, _, name = spec.rpartition(":")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module(place)
    functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    function = vars(module).get(name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, functions, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"it defines: {', '.join(functions)}"
        raise UserError(
            f"reward function {spec!r}: found no function {name!r} in {place}; {remedy}"
        )
    return cast(Function, function)


def unknown_columns(function: Function, columns: Sequence[str]) -> list[str]:
    """Parameters without a default that neither the convention nor the data set provides."""
    given = {*_GIVEN[_convention(function)], *columns}
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in given
    ]


def judged(function: Function, batch: Batch) -> list[Verdict]:
    """One verdict per completion; raises what the function raises."""
    result = _CALLS[_convention(function)](function, batch)
    values = _as_list(result)
    if len(values) != len(batch):
        reason = f"returned {len(values)} values for {len(batch)} completions; expected one each"
        raise ValueError(reason)
    return [_verdict(value) for value in values]


def reason_of(error: BaseException) -> str:
    """One line: what was raised, and where in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).parent
    theirs = [f for f in frames if Path(f.filename).parent != ours and "asyncio" not in f.filename]
    place = f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""
    try:
        said = str(error)
    except Exception:  # the user's own class may not be able to say it
        said = "(its text cannot be read)"
    return f"{type(error).__name__}: {said}{place}"


def is_score(number: float) -> bool:
    """Whether it can be trained on."""
    return abs(number) <= LARGEST_SCORE  # False for NaN


def _verdict(value: object) -> Verdict:
    if isinstance(value, Verdict):  # of our own functions, which can say why they failed
        return value
    if value is None:
        return Verdict(value=None)
    try:
        number = float(value) if not isinstance(value, str) else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = None
    if number is None:
        failure = f"returned {value!r} ({type(value).__name__}); expected a number or None"
        return Verdict(value=None, failure=failure[:300])
    if not is_score(number):
        return Verdict(value=None, failure=f"returned {number}; expected {A_SCORE} or None")
    return Verdict(value=number)


def _as_list(result: object) -> list[object]:
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        kind = type(result).__name__
        raise TypeError(f"returned {kind}; expected a list of numbers, one per completion")
    return list(result)


def _resolved(result: object) -> object:
    """Async functions work too; each call gets its own event loop."""
    return _all_resolved([result])[0]


def _all_resolved(results: list[object]) -> list[object]:
    """What is awaitable is awaited at the same time: a remote judge answers all at once."""

    async def awaited() -> list[object]:
        waits = [r if inspect.isawaitable(r) else _already(r) for r in results]
        return list(await asyncio.gather(*waits))

    return asyncio.run(awaited()) if any(map(inspect.isawaitable, results)) else results


async def _already(result: object) -> object:
    return result


def _ignored(*arguments: object, **named: object) -> None:
    """Stands in for TRL's `log_metric` and `log_extra`: a scorer has no trainer's log."""


def _trl(function: Function, batch: Batch) -> object:
    """f(prompts, completions, completion_ids, **columns) -> list[float | None]"""
    arguments: dict[str, object] = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
    }
    parameters, takes_all = _parameters(function)
    if takes_all or "completion_ids" in parameters:
        arguments["completion_ids"] = batch.completion_ids
    # Only where they are asked for by name: what else comes in **kwargs are columns.
    arguments |= {name: value for name, value in _OF_TRAINER.items() if name in parameters}
    if not takes_all:
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    return _resolved(function(**arguments))


def _openrlhf(function: Function, batch: Batch) -> object:
    """reward_func(queries, prompts, labels) -> {"rewards": tensor, ...}"""
    queries = [p + c for p, c in zip(batch.prompt_texts, batch.completion_texts, strict=True)]
    result = _resolved(function(queries, batch.prompt_texts, batch.references))
    return result["rewards"] if isinstance(result, Mapping) else result


def _verl(function: Function, batch: Batch) -> object:
    """compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict"""
    nothing: list[object] = [None] * len(batch)
    sources = batch.columns.get("data_source", nothing)
    infos = batch.columns.get("extra_info", nothing)
    results = _all_resolved(
        [
            function(
                data_source=sources[i],
                solution_str=text,
                ground_truth=batch.references[i],
                extra_info=infos[i],
            )
            for i, text in enumerate(batch.completion_texts)
        ]
    )
    return [result["score"] if isinstance(result, Mapping) else result for result in results]


# There is no trainer where a scorer runs.
_OF_TRAINER: dict[str, object] = {
    "trainer_state": None,
    "log_metric": _ignored,
    "log_extra": _ignored,
}
_CALLS = {"trl": _trl, "openrlhf": _openrlhf, "verl": _verl}
_GIVEN = {
    "trl": ("prompts", "completions", "completion_ids", *_OF_TRAINER),
    "openrlhf": ("queries", "prompts", "labels"),
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
}


@cache
def _parameters(function: Function) -> tuple[frozenset[str], bool]:
    """The names of a function's parameters, and whether it takes any others by name."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters), takes_all


def _convention(function: Function) -> str:
    """Told by the parameter that only one of the conventions has."""
    parameters, _ = _parameters(function)
    if "solution_str" in parameters:
        return "verl"
    return "openrlhf" if "queries" in parameters else "trl"


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise UserError(f"reward module {name!r} needs {error.name!r}: install it") from error
        raise UserError(
            f"reward module {name!r}: not found; install it, or name a file as 'path.py:name'"
        ) from error
    except Exception as error:
        raise UserError(
            f"reward module {name!r} could not be imported: {reason_of(error)}"
        ) from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        remedy = f"did you mean {path.parent / close[0]}?" if close else "check the path"
        raise UserError(f"reward file {path}: not found; {remedy}")
    spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up by name
    sys.path.insert(0, str(path.parent.resolve()))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"reward file {path} could not be loaded: {reason_of(error)}") from error
    return module
