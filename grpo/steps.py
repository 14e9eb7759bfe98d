"""A completion cut into its reasoning steps: spans that follow each other and leave nothing out.

Works on the text alone, by blank lines, lines or sentences. Refuses to know who judges the steps.
Shapes: T tokens of one completion.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from grpo.types import Rollout, Span

# Where one step ends and the next begins; the first kind that occurs is used.
_SEPARATORS = (
    re.compile(r"\n[ \t]*\n\s*"),  # blank line
    re.compile(r"\n\s*"),  # line
    re.compile(r"(?<=[.!?])\s+"),  # sentence
)
_REASONING_END = "</think>"  # what follows restates the answer and is no step of its own
_ANSWER = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence)\b\W*)?(?:the\s+)?(?:final\s+)?answer\b|\W*\\boxed\b|####",
    re.IGNORECASE,
)


def step_spans(rollout: Rollout, place: int, *, min_chars: int) -> tuple[Span, ...]:
    """The steps of the rollout at this place of its group, in tokens; () if it says nothing.

    A token that two steps share belongs to the earlier one. The last step takes the tokens after
    the text, such as the end of sequence.
    """
    ends = step_ends(rollout.text, min_chars=min_chars)
    if not ends or not rollout.num_tokens:
        return ()
    tokens = np.searchsorted(rollout.token_ends, np.array(ends[:-1], np.int64), side="left") + 1
    bounds = sorted({0, rollout.num_tokens, *np.minimum(tokens, rollout.num_tokens).tolist()})
    return tuple(Span(rollout=place, start=start, end=end) for start, end in pairwise(bounds))


def step_ends(text: str, *, min_chars: int) -> tuple[int, ...]:
    """Where each step of a text ends, in characters; the last ends with the text.

    Split at blank lines, else at lines, else at sentences. A step of fewer than min_chars
    characters joins the next; a short last one and a final answer join the one before.
    "7+5=12\\n12*3=36\\nanswer: 36" with min_chars 1: 7, 26.
    """
    if not text.strip():
        return ()
    reasoning = text.partition(_REASONING_END)[0]
    starts = _starts(reasoning) if reasoning.strip() else [0]
    kept = [0]
    for start in starts[1:]:
        if len(text[kept[-1] : start].strip()) >= min_chars:
            kept.append(start)
    last_end = len(reasoning) if reasoning.strip() else len(text)
    while len(kept) > 1 and _joins_the_one_before(text[kept[-1] : last_end], min_chars):
        last_end = kept.pop()
    return (*kept[1:], len(text))


def _starts(reasoning: str) -> list[int]:
    """Where the pieces begin that the coarsest separator in the text leaves."""
    for separator in _SEPARATORS:
        cuts = [found.end() for found in separator.finditer(reasoning)]
        starts = [cut for cut in cuts if reasoning[:cut].strip() and reasoning[cut:].strip()]
        if starts:
            return [0, *starts]
    return [0]


def _joins_the_one_before(piece: str, min_chars: int) -> bool:
    return len(piece.strip()) < min_chars or _ANSWER.match(piece) is not None
