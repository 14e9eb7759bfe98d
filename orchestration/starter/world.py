"""Problems of step-by-step arithmetic, their exact traces, and how a written trace is judged.

Knows numbers and text only: no tokens, no model, no files. Operations apply strictly left to right.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Symbol = Literal["+", "-", "*"]
Split = Literal["train", "heldout"]
Domain = Literal["sums", "products"]

DIFFICULTIES = (2, 3, 4, 5, 6)  # number of operations
MAX_VALUE = 99  # running values stay in 0..MAX_VALUE, so they have two digits at most
MAX_START = 30  # a low start leaves room for "+" and "*"
HELD_OUT_ONE_IN = 20  # one prompt text in so many belongs to the held-out split

_PROMPT = re.compile(r"(\d{1,2})((?: [-+*]\d)+)")
_STEP = re.compile(r"(\d{1,3})([-+*])(\d{1,3})=(\d{1,3})")
_CHECK_PREFIX = "check: "
_ANSWER = re.compile(r"answer: (\d{1,3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One link of the chain: a symbol and a one-digit operand."""

    symbol: Symbol
    operand: int

    def applied(self, value: int) -> int:
        """The running value after this operation."""
        if self.symbol == "+":
            return value + self.operand
        return value - self.operand if self.symbol == "-" else value * self.operand

    def step(self, value: int, result: int) -> str:
        """The line that claims `value op operand = result`, whether or not it is true."""
        return f"{value}{self.symbol}{self.operand}={result}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A start number and operations; everything else follows from them."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def difficulty(self) -> int:
        return len(self.operations)

    @property
    def domain(self) -> Domain:
        return "products" if any(op.symbol == "*" for op in self.operations) else "sums"

    @property
    def prompt(self) -> str:
        """For example `7 +5 *3 -4`."""
        return " ".join([str(self.start), *(f"{op.symbol}{op.operand}" for op in self.operations)])

    @property
    def values(self) -> tuple[int, ...]:
        """The running values, the start first: one more than there are operations."""
        values = [self.start]
        for op in self.operations:
            values.append(op.applied(values[-1]))
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def steps(self) -> tuple[str, ...]:
        """The ground-truth steps, for example `("7+5=12", "12*3=36", "36-4=32")`."""
        values = self.values
        return tuple(op.step(values[i], values[i + 1]) for i, op in enumerate(self.operations))

    @property
    def solution(self) -> str:
        """The ground-truth trace: the steps, one a line, then the answer."""
        return "\n".join([*self.steps, answer_line(self.answer)])

    @property
    def hint(self) -> str:
        """What is left once half of the operations are done: `12 *3 -4` of `7 +5 *3 -4`."""
        done = self.difficulty // 2
        left = Problem(start=self.values[done], operations=self.operations[done:])
        return left.prompt


def answer_line(value: int) -> str:
    """The line that ends a trace."""
    return f"answer: {value}"


def check_line(step: str) -> str:
    """The line that repeats a step as a check."""
    return f"{_CHECK_PREFIX}{step}"


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, a property of its text: no seed can mix the two."""
    return "heldout" if zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0 else "train"


def generated(seed: int, index: int, difficulty: int, *, split: Split = "train") -> Problem:
    """The problem number `index` of an endless seeded sequence of this difficulty and split."""
    if difficulty < 1 or index < 0:
        raise ValueError(
            f"found difficulty {difficulty}, index {index}; expected difficulty >= 1 and index >= 0"
        )
    rng = random.Random(f"problem/{seed}/{index}/{difficulty}/{split}")
    while True:
        problem = _drawn(rng, difficulty)
        if split_of(problem.prompt) == split:
            return problem


def parsed_prompt(prompt: str) -> Problem:
    """The problem that a prompt text states."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"found prompt {prompt!r}; expected a chain such as '7 +5 *3 -4'")
    operations = tuple(
        Operation(symbol=_symbol(word[0]), operand=int(word[1:])) for word in match[2].split()
    )
    return Problem(start=int(match[1]), operations=operations)


class LineKind(Enum):
    STEP = "step"
    CHECK = "check"
    ANSWER = "answer"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a written trace; `correct` says whether it is right where it stands."""

    kind: LineKind
    text: str
    start: int  # characters into the trace
    end: int  # one past the line's last character, the newline included where there is one
    correct: bool


def judged(problem: Problem, trace: str) -> tuple[Line, ...]:
    """Every line of a trace, re-computed.

    A step is correct if it continues from the value its trace reached so far, applies the problem's
    next operation and computes it rightly, so that one slip makes one wrong step and not all later
    ones. A check is correct if it repeats the step before it and that step's result is right. An
    answer is correct if all operations were applied and it equals the true answer.
    """
    lines: list[Line] = []
    value, done, last_step = problem.start, 0, ""
    for start, end, text in _split_lines(trace):
        kind, correct = LineKind.OTHER, False
        if step := _STEP.fullmatch(text):
            kind = LineKind.STEP
            if done < problem.difficulty:
                op = problem.operations[done]
                correct = text == op.step(value, op.applied(value))
            value, done, last_step = int(step[4]), done + 1, text
        elif text.startswith(_CHECK_PREFIX):
            kind, claim = LineKind.CHECK, text.removeprefix(_CHECK_PREFIX)
            correct = claim == last_step and _is_true(claim)
        elif answer := _ANSWER.fullmatch(text):
            kind = LineKind.ANSWER
            correct = done == problem.difficulty and int(answer[1]) == problem.answer
        lines.append(Line(kind=kind, text=text, start=start, end=end, correct=correct))
    return tuple(lines)


def first_wrong_step(problem: Problem, trace: str) -> int | None:
    """The index, among the trace's steps, of the first wrong one; None if every step is right."""
    steps = [line for line in judged(problem, trace) if line.kind is LineKind.STEP]
    return next((i for i, line in enumerate(steps) if not line.correct), None)


def final_answer(trace: str) -> int | None:
    """The number on the trace's last line; None if that line is no answer, as after a cut-off."""
    match = _ANSWER.fullmatch(trace.rsplit("\n", 1)[-1].strip())
    return int(match[1]) if match else None


def is_solved(problem: Problem, trace: str) -> bool:
    """Whether the trace ends in the right answer, however it got there."""
    return final_answer(trace) == problem.answer


def _drawn(rng: random.Random, difficulty: int) -> Problem:
    start = value = rng.randint(1, MAX_START)
    operations: list[Operation] = []
    for _ in range(difficulty):
        by_symbol = [candidates for symbol in "+-*" if (candidates := _possible(value, symbol))]
        op = rng.choice(rng.choice(by_symbol))
        operations.append(op)
        value = op.applied(value)
    return Problem(start=start, operations=tuple(operations))


def _possible(value: int, symbol: str) -> list[Operation]:
    """The operations of one symbol that keep the running value in range."""
    operands = range(2, 6) if symbol == "*" else range(1, 10)
    candidates = [Operation(symbol=_symbol(symbol), operand=k) for k in operands]
    return [op for op in candidates if 0 <= op.applied(value) <= MAX_VALUE]


def _symbol(character: str) -> Symbol:
    if character == "+":
        return "+"
    return "-" if character == "-" else "*"


def _is_true(claim: str) -> bool:
    match = _STEP.fullmatch(claim)
    if match is None:
        return False
    operation = Operation(symbol=_symbol(match[2]), operand=int(match[3]))
    return operation.applied(int(match[1])) == int(match[4])


def _split_lines(trace: str) -> Iterator[tuple[int, int, str]]:
    """The start, the end (newline included) and the text (without it) of every line."""
    start = 0
    for line in trace.splitlines(keepends=True):
        yield start, start + len(line), line.rstrip("\n")
        start += len(line)
