"""What a judge model is asked about a rollout, and what its reply says of each span.

Pure functions of texts; knows no model and no server. A step is what lies between two
neighbouring boundaries of the spans that are asked for; steps are numbered from 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from grpo.types import Prompt
from reward_services.model_judge.config import FIELD, ModelJudgeConfig, Template, turns_of

KEY = "first_wrong_step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What goes to a model."""

    messages: tuple[Mapping[str, str], ...]  # role and content
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back. Exactly one is None."""

    text: str | None
    failure: str | None = None


def steps_of(text: str, boundaries: Sequence[int]) -> list[int]:
    """Where each step ends, in characters; blank ones belong to the step before them.

    "7+5=12\\n12*3=36\\n" cut at 7: 7, 16. "a\\n\\n\\nb" cut at 2 and 4: 4, 5.
    """
    bounds = sorted({0, *boundaries, len(text)})
    ends: list[int] = []
    for start, end in pairwise(bounds):
        if text[start:end].strip() or not ends:
            ends.append(end)
        else:
            ends[-1] = end
    if len(ends) > 1 and not text[: ends[0]].strip():
        ends.pop(0)
    return ends if text.strip() else []


def numbered(text: str, ends: Sequence[int]) -> str:
    """The steps, one below the other: "[1] 7+5=12\\n[2] 12*3=36"."""
    parts = [text[start:end].strip() for start, end in pairwise([0, *ends])]
    return "\n".join(f"[{number}] {part}" for number, part in enumerate(parts, 1))


def reference_of(prompt: Prompt, config: ModelJudgeConfig) -> str | None:
    """What the judge may compare with; None: nothing. ValueError if the row has no such text."""
    if config.reference == "withheld":
        return None
    column = config.solution_column
    found = prompt.reference if config.reference == "answer" else prompt.columns.get(column, None)
    if not isinstance(found, str):
        wanted = (
            "reference answer" if config.reference == "answer" else f"text in column {column!r}"
        )
        raise ValueError(
            f"prompt {prompt.id} has no {wanted}, which the judge compares with: name another "
            "(judge.reference, judge.solution_column), or set judge.reference: withheld"
        )
    return found


def question(
    text: str,
    ends: Sequence[int],
    *,
    problem: str,
    reference: str | None,
    template: Template,
    system: str | None = None,
) -> Question:
    """Fill the template in; a field inside a field's text stays as it is."""
    values = {
        "problem": problem.strip(),
        "reference": "" if reference is None else reference.strip(),
        "steps": numbered(text, ends),
        "answer": text.strip(),
        "num_steps": str(len(ends)),
    }
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns_of(template):
        content = FIELD.sub(lambda found: values[found[1]], turn.content)
        messages.append({"role": turn.role, "content": content})
    return Question(messages=tuple(messages), num_steps=len(ends))


def too_long(num_tokens: int, room: int) -> str:
    """Why a question was not put."""
    return (
        f"the judge's question has {num_tokens} tokens and {room} have room beside the reply: "
        "raise judge.model.max_model_len"
    )


def reply_schema(num_steps: int) -> dict[str, object]:
    """JSON Schema of a reply about so many steps."""
    step = {"type": ["integer", "null"], "minimum": 1, "maximum": num_steps}
    return {
        "type": "object",
        "properties": {KEY: step},
        "required": [KEY],
        "additionalProperties": False,
    }


def reply_text(first_wrong: int | None) -> str:
    """A reply as structured output writes it, without white space."""
    return json.dumps({KEY: first_wrong}, separators=(",", ":"))


def first_wrong_step(reply: str, num_steps: int) -> int | None:
    """The step that a reply names, from 1; None: no step is wrong. ValueError: it says neither."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError) as error:  # RecursionError: a hundred thousand "["
        raise ValueError(f"the judge's reply {reply!r:.200} is no JSON") from error
    if not isinstance(found, dict) or list(found) != [KEY]:
        raise ValueError(f"the judge's reply {reply!r:.200} is no object with {KEY!r} alone")
    step = found[KEY]
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= num_steps:
        raise ValueError(
            f"the judge's reply {reply!r:.200} names no step from 1 to {num_steps}, and not null"
        )
    return step


def span_value(end: int, ends: Sequence[int], first_wrong: int | None) -> float:
    """1 if nothing is wrong up to character `end`, else 0.

    So a step before the first wrong one has 1, that one and those that build on it have 0.
    """
    if first_wrong is None:
        return 1.0
    begin = ends[first_wrong - 2] if first_wrong > 1 else 0
    return float(end <= begin)
