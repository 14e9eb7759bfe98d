"""Reads groups from files: one group, a list, a batch, JSON lines, or the records of a run.

Everything becomes the schema of `group_schema.py` and then the records of `grpo/types.py`, in
double precision. Refuses to know any algorithm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from grpo.errors import UserError
from grpo.types import (
    FinishReason,
    Float32,
    Float64,
    Group,
    Int32,
    Origin,
    Piece,
    Prompt,
    Rollout,
    Score,
    Span,
)
from orchestration.group_schema import (
    BatchInput,
    GroupInput,
    Measured,
    PerToken,
    PromptInput,
    RolloutInput,
    ScoreInput,
)
from orchestration.run_directory import GROUPS_FILE
from orchestration.settings import described, paths_of

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which groups of a file are meant; None: every one (of a run: every one of its last step)."""

    step: int | None = None
    groups: tuple[int, ...] | None = None


def read_groups(path: Path | str) -> list[Group]:
    """The groups of a file, in its order; UserError with every problem."""
    return groups_of(read_batch(path))


def read_batch(path: Path | str, chosen: Selection | None = None) -> BatchInput:
    """A file, `-` for standard input, or the folder of a run; UserError with every problem."""
    wanted = chosen or Selection()
    name, text = _text(path)
    batch = _as_batch(name, _values(name, text), wanted)
    try:
        return BatchInput.model_validate(batch)
    except ValidationError as error:
        raise UserError(_message(name, error, single=len(batch["groups"]) == 1)) from None


def groups_of(batch: BatchInput) -> list[Group]:
    """The groups as the driver would hold them; values stay in double precision."""
    return [_group(group, place) for place, group in enumerate(batch.groups)]


def stream(values: PerToken | None, size: int, default: Float64) -> Float64:
    """[T] one number per token."""
    if values is None:
        return default
    return np.full(size, values) if isinstance(values, float | int) else np.array(values, float)


def proximal(rollout: RolloutInput) -> Float64:
    """[T] of the policy at the start of the step."""
    return stream(rollout.proximal_log_probs, rollout.num_tokens, behaviour(rollout))


def current(rollout: RolloutInput) -> Float64:
    """[T] of the policy in this update."""
    return stream(rollout.current_log_probs, rollout.num_tokens, proximal(rollout))


def behaviour(rollout: RolloutInput) -> Float64:
    """[T] of the policy that sampled."""
    size = rollout.num_tokens
    nearest = (rollout.log_probs, rollout.proximal_log_probs, rollout.current_log_probs)
    given = next((values for values in nearest if values is not None), None)
    return stream(given, size, np.zeros(size))


def token_texts(rollout: Rollout) -> list[str]:
    """Each token's part of the text; a token without any, such as the end, is shown as its id."""
    starts = [0, *rollout.token_ends.tolist()]
    parts = [rollout.text[a:b] for a, b in pairwise(starts)]
    return [part or f"<{token}>" for part, token in zip(parts, rollout.tokens, strict=True)]


def _text(path: Path | str) -> tuple[str, str]:
    if str(path) == "-":
        return "standard input", sys.stdin.read()
    file = Path(path)
    if file.is_dir():
        file = file / GROUPS_FILE
        if not file.is_file():
            raise UserError(f"{path}: found no {GROUPS_FILE}; expected the folder of a run")
    try:
        return file.name, file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text ({error}); expected JSON in UTF-8") from error


def _values(name: str, text: str) -> list[Json]:
    """One JSON value, or one on each line."""
    try:
        value = json.loads(text)
        values = value if isinstance(value, list) else [value]
    except json.JSONDecodeError as whole:
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        values = []
        for number, line in lines:
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                # A file that was meant as one value is told so: its first line is no value.
                cause = whole if number == lines[0][0] else error
                at = cause.lineno if cause is whole else number
                raise UserError(f"{name}, line {at}: no JSON ({cause.msg})") from error
    bad = next((value for value in values if not isinstance(value, dict)), None)
    if not values or bad is not None:
        found = "nothing" if not values else f"{bad!r:.40}"
        raise UserError(f"{name}: found {found}; expected a group, a list of groups or a batch")
    return values


def _as_batch(name: str, values: Sequence[Json], wanted: Selection) -> Json:
    if len(values) == 1 and "groups" in values[0]:
        batch = dict(values[0])
        groups = batch["groups"] if isinstance(batch["groups"], list) else [batch["groups"]]
    else:
        batch, groups = {}, list(values)
    records = [value for value in groups if isinstance(value, dict) and "times" in value]
    if records and len(records) < len(groups):
        raise UserError(f"{name}: found records of a run beside other groups; expected one kind")
    if records:
        groups, batch["step"] = _recorded(name, records, wanted)
    elif wanted.step is not None:
        raise UserError(f"{name}: only the records of a run have steps; leave --step out")
    if wanted.groups is not None:
        groups = _named(name, groups, wanted.groups)
    states = [value["state"] for value in groups if isinstance(value, dict) and "state" in value]
    if states and "state" not in batch:
        if any(state != states[0] for state in states):
            raise UserError(f"{name}: the groups have different states; a step has one")
        batch["state"] = states[0]
    return {**batch, "groups": groups}


def _recorded(name: str, records: Sequence[Json], wanted: Selection) -> tuple[list[Json], int]:
    """The groups of one step; those that fell out only where they are named."""
    steps = sorted({int(record["step"]) for record in records if "step" in record})
    step = wanted.step
    if step is None:
        named = wanted.groups or ()
        of = [int(r["step"]) for r in records if r["group"] in named]
        trained = [int(r["step"]) for r in records if "dropped" not in r]
        step = max(of or trained or steps or [1])
    found = [r for r in records if "step" not in r or r["step"] == step]
    if wanted.groups is None:
        found = [r for r in found if "dropped" not in r] or found
    if not found:
        raise UserError(f"{name}: found no group of step {step}; it has {_ranges(steps)}")
    return [from_record(record) for record in found], max(step, 1)


def _named(name: str, groups: Sequence[Json], ids: Sequence[int]) -> list[Json]:
    places = {int(group.get("id", place)): group for place, group in enumerate(groups)}
    missing = [number for number in ids if number not in places]
    if missing:
        raise UserError(f"{name}: found no group {missing[0]}; it has {_ranges(sorted(places))}")
    return [{"id": number, **places[number]} for number in ids]


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"only {numbers[0]}"


def from_record(record: Json) -> Json:
    """A line of groups.jsonl (`records.py`) as a group; what training made of it is left out."""
    prompt = {key: v for key, v in record["prompt"].items() if key in PromptInput.model_fields}
    prompt.setdefault("tokens", [0] * int(record["prompt"]["num_tokens"]))
    rollouts, scores = [], []
    for place, item in enumerate(record["rollouts"]):
        kept = {key: v for key, v in item.items() if key in RolloutInput.model_fields}
        # Records name the oldest and the newest weights only.
        kept["versions"] = item["versions"][0] if item["versions"] else 0
        rollouts.append(kept)
        scores += _recorded_scores(place, item)
    return {"id": record["group"], "prompt": prompt, "rollouts": rollouts, "scores": scores}


def _recorded_scores(place: int, item: Json) -> list[Json]:
    whole = [
        {"scorer": scorer, "rollout": place, "value": value}
        for scorer, value in item["scores"].items()
    ]
    spans = [
        {"scorer": scorer, "rollout": place, "start": start, "end": end, "value": value}
        for scorer, found in item.get("span_scores", {}).items()
        for start, end, value in found
    ]
    failures = [
        {"scorer": scorer, "rollout": place, "failure": failure}
        for scorer, failure in item.get("failures", {}).items()
    ]
    return [*whole, *spans, *failures]


def _message(name: str, error: ValidationError, *, single: bool) -> str:
    settings = paths_of(BatchInput)
    # Who wrote one group need not know that it became a list.
    shown = "groups.0" if single else "\0"
    details = error.errors()
    # A list whose members are wrong is reported as too short, too.
    inner = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    lines = [
        line.removeprefix(shown).lstrip(".: ")
        for detail in details
        if not (detail["type"] == "too_short" and detail["loc"] in inner)
        for line in described(".".join(map(str, detail["loc"])), dict(detail), settings)
    ]
    problems = list(dict.fromkeys(lines))
    if len(problems) == 1:
        return f"{name}: {problems[0]}"
    return "\n".join([f"{name} has {len(problems)} problems:", *(f"  {p}" for p in problems)])


def _group(group: GroupInput, place: int) -> Group:
    prompt = Prompt(
        id=group.prompt.id,
        text=group.prompt.text,
        tokens=_int32(group.prompt.tokens),
        reference=group.prompt.reference,
        solution_tokens=_int32(group.prompt.solution_tokens),
        domain=group.prompt.domain,
        columns=dict(group.prompt.columns),
    )
    ids: dict[str, int] = {}
    rollouts = tuple(_rollout(r, i, prompt, ids) for i, r in enumerate(group.rollouts))
    outcomes = [
        ScoreInput(scorer=scorer, rollout=i, value=value)
        for scorer, values in group.outcomes.items()
        for i, value in enumerate(values)
    ]
    scores = tuple(_score(score, rollouts) for score in (*outcomes, *group.scores))
    return Group(
        id=place if group.id is None else group.id, prompt=prompt, rollouts=rollouts, scores=scores
    )


def _rollout(item: RolloutInput, index: int, prompt: Prompt, ids: dict[str, int]) -> Rollout:
    size = item.num_tokens
    texts = item.token_texts
    tokens = item.tokens
    if tokens is None:
        tokens = tuple(ids.setdefault(text, len(ids)) for text in texts or ())
    text = item.text if item.text is not None else "".join(texts or ())
    origins = _origins(item)
    nothing = np.full(size, np.nan)
    measured = {name: _measured(values, size, nothing) for name, values in item.measured.items()}
    versions = np.broadcast_to(np.asarray(item.versions, np.int32), (size,))
    return Rollout(
        index=index,
        context=prompt.tokens if item.context is None else _int32(item.context),
        tokens=_int32(tokens),
        log_probs=cast(Float32, behaviour(item)),
        origins=origins,
        versions=np.where(origins == Origin.GUIDANCE, -1, versions).astype(np.int32),
        text=text,
        token_ends=_token_ends(item, text),
        finish_reason=FinishReason(item.finish_reason),
        train_context=None if item.train_context is None else _int32(item.train_context),
        lineage=tuple(Piece(id=piece.id, end=piece.end) for piece in item.lineage),
        measured=cast(dict[str, Float32], measured),
    )


def _measured(values: Measured, size: int, nothing: Float64) -> Float64:
    if isinstance(values, tuple):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return stream(values, size, nothing)


def _origins(item: RolloutInput) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if item.origins is None:
        is_guidance = np.arange(item.num_tokens) < item.num_guidance_tokens
    else:
        is_guidance = np.array([origin == "guidance" for origin in item.origins], bool)
    return np.where(is_guidance, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8)


def _token_ends(item: RolloutInput, text: str) -> Int32:
    """As given, by the tokens' strings, or (without either) the text in equal parts."""
    if item.token_ends is not None:
        return np.minimum(_int32(item.token_ends), len(text)).astype(np.int32)
    if item.token_texts is not None:
        ends = np.cumsum([len(part) for part in item.token_texts], dtype=np.int32)
        return np.minimum(ends, len(text)).astype(np.int32)
    size = item.num_tokens
    return (np.arange(1, size + 1) * len(text) // max(size, 1)).astype(np.int32)


def _score(score: ScoreInput, rollouts: Sequence[Rollout]) -> Score:
    end = rollouts[score.rollout].num_tokens if score.end is None else score.end
    span = Span(rollout=score.rollout, start=score.start, end=end)
    return Score(scorer=score.scorer, span=span, value=score.value, failure=score.failure)


def _int32(values: Sequence[int]) -> Int32:
    return np.asarray(values, np.int32).reshape(-1)


def scorers_of(groups: Sequence[Group], weights: Mapping[str, float]) -> dict[str, float]:
    """Every scorer of the groups with its coefficient, in the order in which they appear."""
    names = dict.fromkeys(score.scorer for group in groups for score in group.scores)
    return {name: weights[name] if name in weights else 1.0 for name in [*weights, *names]}
