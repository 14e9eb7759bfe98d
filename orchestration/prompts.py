"""Data sets as prompts, every line checked before anything starts.

Reads JSONL, Parquet and Hugging Face data sets in TRL's or verl's layout. The tokenizer is passed
in. Refuses to know in which order prompts are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from grpo.errors import UserError
from grpo.types import Int32, Prompt
from orchestration.config import DataConfig
from orchestration.data_files import Row, rows_of
from orchestration.stored_prompts import is_stored_group, stored_prompt

MAX_PROBLEMS_SHOWN = 10

Message = Mapping[str, str]
Columns = Mapping[str, object]


class PromptTokenizer(Protocol):
    """What a data set needs of a tokenizer."""

    def encode_prompt(self, prompt: str | Sequence[Message]) -> Int32:
        """With the chat template, ready for the answer."""
        ...

    def encode_text(self, text: str) -> Int32:
        """Without special tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptSet:
    """The usable prompts of a data set, in its order."""

    source: str
    prompts: tuple[Prompt, ...]
    num_dropped: int  # longer than allowed, if the recipe says to drop those


def load_prompts(
    source: str, data: DataConfig, tokenizer: PromptTokenizer, *, max_prompt_length: int, split: str
) -> PromptSet:
    """Every row as a prompt; UserError with the lines that are none."""
    prompts: list[Prompt] = []
    problems: list[str] = []
    num_dropped = 0
    for row in rows_of(source, split=split):
        try:
            prompt = _prompt(row, data, tokenizer)
        except ValueError as error:
            problems.append(f"{row.place}: {error}")
            continue
        if len(prompt.tokens) <= max_prompt_length:
            prompts.append(prompt)
        elif data.on_long_prompt == "drop":
            num_dropped += 1
        else:
            problems.append(
                f"{row.place}: the prompt has {len(prompt.tokens)} tokens, but "
                f"sampling.max_prompt_length is {max_prompt_length}; raise it, or set "
                "data.on_long_prompt: drop"
            )
    if problems:
        raise UserError(_summary(source, problems))
    if not prompts:
        raise UserError(
            f"{source}: found no prompt"
            + (f" of at most {max_prompt_length} tokens" if num_dropped else "")
            + "; expected at least one row"
        )
    return PromptSet(source=source, prompts=tuple(prompts), num_dropped=num_dropped)


def _prompt(row: Row, data: DataConfig, tokenizer: PromptTokenizer) -> Prompt:
    """ValueError says which field is wrong."""
    columns = row.columns
    if is_stored_group(columns):
        return stored_prompt(columns, name=row.name, encode=tokenizer.encode_prompt)
    raw = _prompt_value(columns, data.prompt_column)
    solution = _text(_optional(columns, data.solution_column, "solution_column"), "solution")
    domain = _text(_optional(columns, data.domain_column, "domain_column"), "domain")
    try:
        tokens = tokenizer.encode_prompt(raw)
    except UserError as error:
        raise ValueError(str(error)) from error
    if not len(tokens):
        raise ValueError(f"{data.prompt_column!r} gives no token at all")
    return Prompt(
        id=row.name,
        text=raw if isinstance(raw, str) else "\n".join(m["content"] for m in raw),
        tokens=tokens,
        reference=_reference(columns, data),
        solution_tokens=(
            np.zeros(0, np.int32) if solution is None else tokenizer.encode_text(solution)
        ),
        domain="default" if domain is None else domain,
        columns={**columns, "prompt": raw},
    )


def _prompt_value(columns: Columns, name: str) -> str | list[Message]:
    if name not in columns:
        found = ", ".join(columns)
        raise ValueError(f"no column {name!r}; found: {found}; set data.prompt_column to one")
    value = columns[name]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name!r} is empty; expected text or a list of messages")
        return value
    if not isinstance(value, list) or not value:
        kind = type(value).__name__
        raise ValueError(f"{name!r} is {kind}; expected text or a list of messages")
    for i, message in enumerate(value):
        fine = isinstance(message, dict) and all(
            key in message and isinstance(message[key], str) for key in ("role", "content")
        )
        if not fine:
            raise ValueError(
                f"message {i} of {name!r} is {message!r:.80}; expected "
                "{'role': 'user', 'content': '...'}"
            )
    return cast("list[Message]", value)


def _reference(columns: Columns, data: DataConfig) -> str | None:
    """The answer column, else where verl keeps it: reward_model.ground_truth."""
    answer = _optional(columns, data.answer_column, "answer_column", verl=True)
    if answer is None:
        nested = columns.get("reward_model", None)
        if isinstance(nested, Mapping) and "ground_truth" in nested:
            answer = nested["ground_truth"]
    return _text(answer, "answer")


def _optional(columns: Columns, name: str | None, setting: str, *, verl: bool = False) -> object:
    """None where a column is absent, unless the recipe names another than the usual one."""
    if name is None:
        return None
    if name in columns:
        return columns[name]
    is_usual = name == DataConfig.model_fields[setting].default
    if not is_usual and not (verl and "reward_model" in columns):
        found = ", ".join(columns)
        raise ValueError(f"no column {name!r}, which data.{setting} names; found: {found}")
    return None


def _text(value: object, what: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"the {what} is {value!r:.80}; expected text or a number")


def _summary(source: str, problems: Sequence[str]) -> str:
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        return shown[0]
    return "\n".join(
        [f"{Path(source).name} has {len(problems)} bad rows:", *("  " + p for p in shown)]
    )
