"""Answers to starter problems with their first wrong step, as questions and replies of a judge.

The labels are those of the rule that re-computes each step. Knows text only, no model.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from grpo.steps import step_ends
from orchestration.starter.behaviours import Behaviour, written_trace
from orchestration.starter.world import DIFFICULTIES, Problem, Split, generated
from reward_services.model_judge.questions import question, reply_text, steps_of
from reward_services.step_judge import starter_step

# Short, and of the starter's characters: the judge has one token a character.
PROMPT = "{problem}\n{reference}\n\n{steps}"
PROMPT_WITHHELD = "{problem}\n\n{steps}"

# Slips are what a judge is for; the other behaviours teach it what is not wrong.
_SHARES = {
    Behaviour.SLOPPY: 0.6,
    Behaviour.HASTY: 0.15,
    Behaviour.RAMBLING: 0.1,
    Behaviour.RECHECKING: 0.1,
    Behaviour.CAREFUL: 0.05,
}
_MISTYPED = 0.15  # share of traces with one other character, a mistake of any kind
_TYPED = string.digits + "+-*=\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTrace:
    """An answer, cut into steps, and which of them is the first wrong one."""

    problem: Problem
    text: str
    ends: tuple[int, ...]  # characters
    first_wrong: int | None  # from 1; None: every step is right


def labelled(problem: Problem, text: str) -> LabelledTrace:
    """Cut an answer as SGPO does and judge its steps by the rule."""
    ends = steps_of(text, step_ends(text, min_chars=1))
    bounds = zip([0, *ends], ends, strict=False)
    verdicts = [starter_step(problem.prompt, text, start, end) for start, end in bounds]
    wrong = [number for number, verdict in enumerate(verdicts, 1) if verdict == 0]
    return LabelledTrace(
        problem=problem, text=text, ends=tuple(ends), first_wrong=wrong[0] if wrong else None
    )


def drawn_trace(
    rng: random.Random, index: int, *, seed: int, split: Split, cut_off: Callable[[str], str]
) -> LabelledTrace:
    """Number `index` of an endless seeded sequence; `cut_off` ends it where a rollout would."""
    problem = generated(seed, index, rng.choice(DIFFICULTIES), split=split)
    behaviour = rng.choices(list(_SHARES), weights=list(_SHARES.values()))[0]
    text = written_trace(problem, behaviour, rng)
    if rng.random() < _MISTYPED:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(_TYPED) + text[place + 1 :]
    return labelled(problem, cut_off(text))


def question_and_reply(trace: LabelledTrace, *, with_reference: bool) -> tuple[str, str]:
    """What the judge is asked about a trace, in the words that a scorer uses, and its reply."""
    asked = question(
        trace.text,
        trace.ends,
        problem=trace.problem.prompt,
        reference=trace.problem.solution if with_reference else None,
        template=PROMPT if with_reference else PROMPT_WITHHELD,
    )
    return asked.messages[0]["content"], reply_text(trace.first_wrong)
