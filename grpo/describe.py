"""An algorithm in words: at each point the function that stands there and its settings.

Refuses to know the screen; everything is read from the two records and the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

from grpo.objective import Learnable, Measure, Objective, Penalty, ReferenceUpdate
from grpo.pipeline import Measured, Pipeline, Reward, Stage
from grpo.rewards import weighted_outcome


def described(pipeline: Pipeline, objective: Objective) -> list[tuple[str, list[str]]]:
    """For each point, in the order of execution, one line per function that stands there."""
    described_points = [*_points(pipeline), *_points(objective)]
    if pipeline.initial_state is not None:
        described_points.append(("initial_state", [repr(pipeline.initial_state)]))
    return described_points


def _points(record: Pipeline | Objective) -> list[tuple[str, list[str]]]:
    """What stands at the points of one half; a point that nothing uses is left out if it may be."""
    values = [(field.name, getattr(record, field.name)) for field in fields(record)]
    return [
        (name, _lines(value))
        for name, value in values
        if name != "initial_state" and value is not None and value is not False
    ]


def call_text(fn: Callable[..., object]) -> str:
    """The function as one would call it: `clipped(low=0.2, high=0.28)`; None is left out."""
    if not isinstance(fn, partial):
        return fn.__name__
    settings = (
        f"{name}={_value(value)}" for name, value in fn.keywords.items() if value is not None
    )
    return f"{call_text(fn.func)}({', '.join(settings)})"


def term_names(rewards: Sequence[Reward]) -> list[str]:
    """As in the metrics: a scorer's own term is called as the scorer, any other as its function.

    Two terms of one function are told apart by the scorer that they read, or by their place.
    """
    names = [_term_name(reward) for reward in rewards]
    for place, reward in enumerate(rewards):
        if names.count(names[place]) > 1:
            names[place] += f"({_scorer(reward) or place})"
    return names


def purpose(fn: Callable[..., object]) -> str:
    """The first line of the function's docstring."""
    inner = fn
    while isinstance(inner, partial):
        inner = inner.func
    return (inner.__doc__ or "").strip().partition("\n")[0]


def _term_name(reward: Reward) -> str:
    function: object = reward
    while isinstance(function, partial):
        function = function.func
    return (
        (_scorer(reward) or "")
        if function is weighted_outcome
        else str(getattr(function, "__name__", function))
    )


def _scorer(reward: Reward) -> str | None:
    scorer = reward.keywords.get("scorer") if isinstance(reward, partial) else None
    return scorer if isinstance(scorer, str) else None


def _lines(value: object) -> list[str]:
    if isinstance(value, tuple):
        return [line for item in value for line in _lines(item)]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Penalty):
        scale = "" if value.scale is None else f"{call_text(value.scale)} of its mean * "
        head = f"{value.coefficient:g} * {scale}{call_text(value.fn)}"
        return [f"{head}: {purpose(value.fn)}"]
    if isinstance(value, Measure | Measured | Stage | Learnable | ReferenceUpdate):
        return [_record_text(value)]
    if isinstance(value, Objective):
        return [f"{point}: {line}" for point, lines in _points(value) for line in lines]
    if value is True:
        return ["yes"]
    assert callable(value), f"a point of an algorithm holds functions, found {value!r}"
    return [f"{call_text(value)}: {purpose(value)}"]


def _record_text(record: Measure | Measured | Stage | Learnable | ReferenceUpdate) -> str:
    settings = {field.name: getattr(record, field.name) for field in fields(record)}
    name = settings.pop("name", None)
    head = type(record).__name__.lower() if name is None else str(name)
    shown = ", ".join(f"{key}={_value(v)}" for key, v in settings.items() if v is not None)
    return f"{head}({shown})"


def _value(value: object) -> str:
    if isinstance(value, frozenset):
        return "+".join(sorted(map(str, value))) or "nothing"
    if callable(value):
        return call_text(value)
    if isinstance(value, tuple) and any(callable(item) for item in value):
        return f"({', '.join(map(_value, value))})"
    return f"{value:g}" if isinstance(value, float) else repr(value)
