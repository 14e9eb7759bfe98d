"""The judge of the starter problems' steps: re-computes every line of a written trace.

A trace applies the operations of its prompt, one a line, strictly left to right: the prompt
"7 +5 *3" asks for "7+5=12", then "12*3=36". Pure functions of texts; knows no scores or batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from reward_services.config import RuleName

# (prompt, completion, first character, end) -> 1 right, 0 wrong, None: no step it can judge
StepRule = Callable[[str, str, int, int], float | None]

_PROMPT = re.compile(r"(\d+)((?: [-+*]\d+)+)")
_STEP = re.compile(r"(-?\d+)([-+*])(\d+)=(-?\d+)")
_CHECK = "check: "


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedLine:
    """One line of a trace."""

    start: int  # characters into the trace
    is_right: bool | None  # None: neither a step nor a check


def starter_step(prompt: str, completion: str, start: int, end: int) -> float | None:
    """Whether every line that begins in [start, end) is right where it stands.

    A step is right if it continues from the value that the line before it reached, right or wrong,
    applies the operation that the prompt asks for next, and computes it rightly. A line
    "check: ..." has to be true, no more. Other lines are not judged.
    """
    lines = judged_lines(prompt, completion)
    verdicts = [line.is_right for line in lines if start <= line.start < end]
    known = [verdict for verdict in verdicts if verdict is not None]
    return float(all(known)) if known else None


def judged_lines(prompt: str, completion: str) -> list[JudgedLine]:
    """Every line of a completion; ValueError if the prompt is none of a starter problem."""
    stated = _PROMPT.fullmatch(prompt.strip())
    if stated is None:
        raise ValueError(f"found prompt {prompt!r}; rule starter_steps expects '7 +5 *3 -4'")
    value, operations = int(stated[1]), stated[2].split()
    lines, start, num_steps = [], 0, 0
    for line in completion.splitlines(keepends=True):
        text, is_right = line.strip(), None
        if text.startswith(_CHECK):
            is_right = _is_true(text.removeprefix(_CHECK))
        elif step := _STEP.fullmatch(text):
            wanted = operations[num_steps] if num_steps < len(operations) else None
            is_right = _is_true(text) and int(step[1]) == value and step[2] + step[3] == wanted
            value, num_steps = int(step[4]), num_steps + 1
        lines.append(JudgedLine(start=start, is_right=is_right))
        start += len(line)
    return lines


def _is_true(claim: str) -> bool:
    step = _STEP.fullmatch(claim)
    if step is None:
        return False
    left, right = int(step[1]), int(step[3])
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[step[2]] == int(step[4])


STEP_RULES: dict[RuleName, StepRule] = {"starter_steps": starter_step}
