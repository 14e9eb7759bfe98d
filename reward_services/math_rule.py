"""Are two mathematical answers the same? LaTeX, expressions, sets, intervals, by math-verify.

The only file that imports math-verify. Sets no time limit of its own: that is its caller's.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

# It warns of each call without a time limit of its own.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
# An answer stands at the end; parsing takes time in proportion to the text, and much of it.
_TAIL_CHARACTERS = 2000


def is_same_mathematics(completion: str, reference: str) -> float:
    """1 if the completion's answer equals the reference; a completion without an answer is wrong.

    `"so x is $\\frac{1}{2}$"` equals `"0.5"`. A reference that cannot be read is a ValueError.
    """
    # A bare formula in the reference is no formula to math-verify unless it is delimited.
    expected = _parsed(reference) if _is_delimited(reference) else _parsed(f"${reference}$")
    if not expected:
        raise ValueError(f"reference answer {reference!r} is no mathematics; use rule: exact")
    found = _parsed(completion[-_TAIL_CHARACTERS:])
    return float(bool(found) and verify(expected, found, timeout_seconds=None))


def _is_delimited(text: str) -> bool:
    return any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))


def _parsed(text: str) -> list[object]:
    # None: no signal.alarm of its own, which would cut the caller's timer short.
    return list(parse(text, parsing_timeout=None))
