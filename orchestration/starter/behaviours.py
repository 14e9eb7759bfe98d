"""How the base policy answers before any reinforcement: five behaviours and their shares.

Reinforcement selects among these; the arithmetic itself is learned beforehand. Knows text only.
"""

from __future__ import annotations

import random
from enum import Enum

from orchestration.starter.world import MAX_VALUE, Problem, answer_line, check_line


class Behaviour(Enum):
    CAREFUL = "careful"  # every step, then the answer
    RECHECKING = "rechecking"  # careful, and repeats one or two steps as checks
    HASTY = "hasty"  # stops early and guesses
    SLOPPY = "sloppy"  # one wrong step or more, continued consistently
    RAMBLING = "rambling"  # careful, but checks each step again and again


# Shares in the order of Behaviour, by difficulty. The right ones fall steeply, so the hardest
# problems are almost never solved although the arithmetic is known.
_SHARES: dict[int, tuple[float, float, float, float, float]] = {
    2: (0.36, 0.10, 0.20, 0.18, 0.16),
    3: (0.17, 0.06, 0.27, 0.26, 0.24),
    4: (0.07, 0.03, 0.32, 0.31, 0.27),
    5: (0.025, 0.01, 0.35, 0.33, 0.285),
    6: (0.008, 0.002, 0.36, 0.33, 0.30),
}
_RAMBLING_CHECKS = (2, 5)  # checks after each step, least and most
# Slips are independent of each other: a model cannot see whether it has slipped before, so a rule
# of one slip a trace would come out as sometimes none, and solve the hardest problems.
_SLIP_PROBABILITY = 0.45
_SLIPS = (-10, -1, 1, 10)  # a lost carry or a miscount: the errors a hurried pupil makes


def drawn_behaviour(difficulty: int, rng: random.Random) -> Behaviour:
    """A behaviour in the share that this difficulty gives it."""
    return rng.choices(list(Behaviour), weights=_SHARES[difficulty])[0]


def written_trace(problem: Problem, behaviour: Behaviour, rng: random.Random) -> str:
    """A trace in the manner of one behaviour."""
    match behaviour:
        case Behaviour.CAREFUL:
            return problem.solution
        case Behaviour.RECHECKING:
            chosen = set(rng.sample(range(problem.difficulty), rng.randint(1, 2)))
            return _with_checks(problem, [int(i in chosen) for i in range(problem.difficulty)])
        case Behaviour.RAMBLING:
            return _with_checks(
                problem, [rng.randint(*_RAMBLING_CHECKS) for _ in problem.operations]
            )
        case Behaviour.HASTY:
            return _hasty(problem, rng)
        case Behaviour.SLOPPY:
            return _sloppy(problem, rng)


def _with_checks(problem: Problem, num_checks: list[int]) -> str:
    lines: list[str] = []
    for step, repeats in zip(problem.steps, num_checks, strict=True):
        lines += [step, *[check_line(step)] * repeats]
    return "\n".join([*lines, answer_line(problem.answer)])


def _hasty(problem: Problem, rng: random.Random) -> str:
    """Half of the time no step at all, else some but not all of them; then a blind guess."""
    num_steps = 0 if rng.random() < 0.5 else rng.randrange(problem.difficulty)
    guess = answer_line(rng.randint(0, MAX_VALUE))
    return "\n".join([*problem.steps[:num_steps], guess])


def _sloppy(problem: Problem, rng: random.Random) -> str:
    slips = [rng.random() < _SLIP_PROBABILITY for _ in problem.operations]
    slips[rng.randrange(problem.difficulty)] |= not any(slips)
    value, lines = problem.start, []
    for slip, op in zip(slips, problem.operations, strict=True):
        result = op.applied(value)
        slipped = [result + s for s in _SLIPS if 0 <= result + s <= MAX_VALUE]
        if slip and slipped:
            result = rng.choice(slipped)
        elif not 0 <= result <= MAX_VALUE:  # only after a slip: the chain left the known range
            break
        lines.append(op.step(value, result))
        value = result
    return "\n".join([*lines, answer_line(value)])
