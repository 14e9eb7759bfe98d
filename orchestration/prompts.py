"""Data sets as prompts, every line checked before anything starts.

Reads JSONL, Parquet and Hugging Face data sets in TRL's or verl's layout. The tokenizer is passed
in. Refuses to know in which order prompts are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from grpo.errors import UserError
from grpo.types import Int32, Prompt
from orchestration.data_config import DataConfig, PromptSource
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

    name: str
    weight: float = 1.0  # relative to that of other sets
    prompts: tuple[Prompt, ...]
    num_dropped: int = 0  # longer than allowed, if the recipe says to drop those

    @property
    def fingerprint(self) -> str:
        """Changes with the tokens, the reference or the order of any prompt."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self.prompts:
            digest.update(f"{len(prompt.tokens)} {prompt.reference!r}".encode())
            digest.update(prompt.tokens.tobytes())
        return digest.hexdigest()


def load_prompts(
    source: PromptSource, tokenizer: PromptTokenizer, *, max_prompt_length: int
) -> PromptSet:
    """Every row as a prompt; UserError with the lines that are none."""
    prompts: list[Prompt] = []
    problems: list[str] = []
    num_dropped = 0
    for row in rows_of(source.source, split=source.split):
        try:
            prompt = _prompt(row, source, tokenizer)
        except ValueError as error:
            problems.append(f"{row.place}: {error}")
            continue
        if len(prompt.tokens) <= max_prompt_length:
            prompts.append(prompt)
        elif source.drops_long:
            num_dropped += 1
        else:
            problems.append(
                f"{row.place}: the prompt has {len(prompt.tokens)} tokens, but "
                f"sampling.max_prompt_length is {max_prompt_length}; raise it, or set "
                "data.on_long_prompt: drop"
            )
    if problems:
        raise UserError(_summary(source.source, problems))
    if not prompts:
        raise UserError(
            f"{source.source}: found no prompt"
            + (f" of at most {max_prompt_length} tokens" if num_dropped else "")
            + "; expected at least one row"
        )
    return PromptSet(
        name=source.name, weight=source.weight, prompts=tuple(prompts), num_dropped=num_dropped
    )


def _prompt(row: Row, source: PromptSource, tokenizer: PromptTokenizer) -> Prompt:
    """ValueError says which field is wrong."""
    columns = row.columns
    name = row.name
    if source.id_prefix is not None:
        name = f"{source.id_prefix}:{row.name.rpartition(':')[2]}"
    if is_stored_group(columns):
        stored = stored_prompt(columns, name=name, encode=tokenizer.encode_prompt)
        return stored if stored.domain != "default" else replace(stored, domain=source.domain)
    raw = _prompt_value(columns, source.prompt_column)
    solution = _text(_optional(columns, source.solution_column, "solution_column"), "solution")
    domain = _text(_optional(columns, source.domain_column, "domain_column"), "domain")
    try:
        tokens = tokenizer.encode_prompt(raw)
    except UserError as error:
        raise ValueError(str(error)) from error
    if not len(tokens):
        raise ValueError(f"{source.prompt_column!r} gives no token at all")
    return Prompt(
        id=name,
        text=raw if isinstance(raw, str) else "\n".join(m["content"] for m in raw),
        tokens=tokens,
        reference=_reference(columns, source),
        solution_tokens=(
            np.zeros(0, np.int32) if solution is None else tokenizer.encode_text(solution)
        ),
        domain=source.domain if domain is None else domain,
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


def _reference(columns: Columns, source: PromptSource) -> str | None:
    """The answer column, else where verl keeps it: reward_model.ground_truth."""
    answer = _optional(columns, source.answer_column, "answer_column", verl=True)
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
