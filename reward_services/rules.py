"""Rules that compare a completion's final answer with the reference: pure functions of two texts.

They know nothing of groups or batches. A completion without an answer is wrong (0); a reference
that cannot be read is the data set's mistake and raises ValueError.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from reward_services.config import AnswerRuleName, ScorerConfig

# The ways in which data sets and models mark a final answer. `answer` must open a line or follow
# a word ("the answer is 7"), so that `canswer` is none.
_MARKER = re.compile(
    r"(?:\banswer\s*(?:is\s*:?|[:=])|####)\**\s*"
    r"|\\boxed\{(?P<boxed>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",
    re.IGNORECASE,
)
# A sign counts only where it cannot be a minus between two operands: "12-5" ends in 5.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:/\d+)?|\.\d+)"
)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_THIN_SPACE = re.compile(r"\\[!,]")  # as LaTeX sets 10\,000
_CHOICE = re.compile(
    r"\((?P<marked>[A-Ja-j])\)|(?<![\w'])(?P<bare>[A-J])(?![\w'])(?!\.\w)(?!(?<=[AI]) +[a-z])"
)
_EDGES = " \t\r\n.,;:!\"'`*$"

Rule = Callable[[str, str], float]  # (completion, reference) -> score


def built_rule(config: ScorerConfig) -> Rule:
    """The comparison that a scorer's settings describe; step_judge.py has the rules for steps."""
    if config.rule == "math":
        # Imported here: sympy takes a second, and the other rules need it not.
        from reward_services.math_rule import is_same_mathematics

        return is_same_mathematics
    compare = _COMPARISONS[config.rule]  # type: ignore[index]  # the caller has checked it
    pattern = re.compile(config.pattern) if config.pattern is not None else None

    def rule(completion: str, reference: str) -> float:
        expected = marked_answer(reference) or reference
        return compare(_found_answer(completion, pattern, config), expected)

    return rule


def marked_answer(text: str) -> str | None:
    """What follows the last marker that marks something; "" if none does, None without a marker.

    `"...\\nanswer: 42 apples"` -> `"42 apples"`.
    """
    markers = list(_MARKER.finditer(text))
    for marker in reversed(markers):
        found = marker["boxed"]
        if found is None:
            end = text.find("\n", marker.end())
            found = text[marker.end() : end if end >= 0 else None]
        if found.strip():
            return found.strip()
    return "" if markers else None


def stated_number(text: str) -> Fraction | None:
    """The number that an answer states, exactly: `"x = 1,234.50 dollars a week"` -> 2469/2.

    What follows the last "=" states the value, and its unit comes after it.
    """
    numbers = _numbers(text.rsplit("=", 1)[-1])
    return numbers[0] if numbers else None


def stated_choice(text: str) -> str | None:
    """The letter that an answer chooses: `"(B) Paris"` -> `"B"`; the last one that it names.

    A bare letter counts as a capital only, and neither "A" nor "I" counts before a word.
    """
    letters = [m["marked"] or m["bare"] for m in _CHOICE.finditer(text)]
    return letters[-1].upper() if letters else None


def normalized(text: str) -> str:
    """Case, accents' encoding, spaces and edge punctuation removed: `" Paris. "` -> `"paris"`."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


def _found_answer(text: str, pattern: re.Pattern[str] | None, config: ScorerConfig) -> str | None:
    """The part of a completion that counts as its answer; None: it gives none."""
    if pattern is not None:
        matches = list(pattern.finditer(text))
        if not matches:
            return None
        return matches[-1].group(1 if pattern.groups else 0)
    marked = marked_answer(text)
    if marked is not None or config.require_marker:
        return marked
    if config.rule == "numeric":
        numbers = _numbers(text)
        return str(numbers[-1]) if numbers else None
    if config.rule == "choice":
        return text
    lines = text.split("\n")
    return next((line for line in reversed(lines) if line.strip()), None)


def _is_equal_number(found: str | None, expected: str) -> float:
    wanted = stated_number(expected)
    if wanted is None:
        raise ValueError(f"reference answer {expected!r} holds no number; use rule: exact")
    return float(found is not None and stated_number(found) == wanted)


def _is_equal_text(found: str | None, expected: str) -> float:
    return float(found is not None and normalized(found) == normalized(expected))


def _is_equal_choice(found: str | None, expected: str) -> float:
    wanted = stated_choice(expected)
    if wanted is None:
        raise ValueError(f"reference answer {expected!r} holds no choice such as B or (B)")
    return float(found is not None and stated_choice(found) == wanted)


def _numbers(text: str) -> list[Fraction]:
    plain = _THIN_SPACE.sub("", _FRACTION.sub(r"\1/\2", text)).replace("\u2212", "-")
    matches = (m.group() for m in _NUMBER.finditer(plain))
    return [number for m in matches if (number := _parsed(m)) is not None]


def _parsed(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # "1.5/2", "5/0"
        return None


_COMPARISONS: dict[AnswerRuleName, Callable[[str | None, str], float]] = {
    "exact": _is_equal_text,
    "numeric": _is_equal_number,
    "choice": _is_equal_choice,
}
