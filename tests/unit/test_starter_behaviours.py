"""The base policy's behaviours."""

from __future__ import annotations

import random
import re

import pytest

from orchestration.starter.behaviours import Behaviour, drawn_behaviour, written_trace
from orchestration.starter.world import (
    DIFFICULTIES,
    LineKind,
    final_answer,
    first_wrong_step,
    generated,
    is_solved,
    judged,
)


def _traces(behaviour: Behaviour, difficulty: int, count: int = 60) -> list[tuple[int, str]]:
    rng = random.Random(0)
    return [(i, written_trace(generated(0, i, difficulty), behaviour, rng)) for i in range(count)]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("behaviour", [Behaviour.CAREFUL, Behaviour.RECHECKING, Behaviour.RAMBLING])
def test_the_right_behaviours_make_no_wrong_line(behaviour: Behaviour, difficulty: int) -> None:
    for i, trace in _traces(behaviour, difficulty):
        assert all(line.correct for line in judged(generated(0, i, difficulty), trace))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_sloppy_trace_has_a_wrong_step_and_every_step_continues_the_last(difficulty: int) -> None:
    for i, trace in _traces(Behaviour.SLOPPY, difficulty):
        problem = generated(0, i, difficulty)
        assert first_wrong_step(problem, trace) is not None
        value = str(problem.start)
        for line in trace.splitlines()[:-1]:
            assert re.split(r"[-+*]", line)[0] == value
            value = line.split("=")[1]
        assert trace.endswith(f"answer: {value}")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_hasty_trace_leaves_steps_out_and_is_almost_never_right(difficulty: int) -> None:
    solved = 0
    for i, trace in _traces(Behaviour.HASTY, difficulty):
        problem = generated(0, i, difficulty)
        steps = [line for line in judged(problem, trace) if line.kind is LineKind.STEP]
        assert len(steps) < difficulty
        assert final_answer(trace) is not None
        solved += is_solved(problem, trace)
    assert solved <= 5


def test_rambling_is_longer_than_rechecking_and_rechecking_than_careful() -> None:
    def mean_lines(behaviour: Behaviour) -> float:
        return sum(trace.count("\n") for _, trace in _traces(behaviour, 4)) / 60

    careful, rechecking, rambling = map(
        mean_lines, (Behaviour.CAREFUL, Behaviour.RECHECKING, Behaviour.RAMBLING)
    )
    assert careful < rechecking < rambling
    assert rambling > 2 * careful


def test_right_behaviours_get_rarer_with_difficulty() -> None:
    rng = random.Random(0)
    right = {Behaviour.CAREFUL, Behaviour.RECHECKING}
    shares = [
        sum(drawn_behaviour(difficulty, rng) in right for _ in range(2000)) / 2000
        for difficulty in DIFFICULTIES
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3
    assert shares[-1] < 0.04


def test_the_same_random_state_writes_the_same_trace() -> None:
    problem = generated(0, 0, 5)
    for behaviour in Behaviour:
        first = written_trace(problem, behaviour, random.Random(7))
        assert first == written_trace(problem, behaviour, random.Random(7))
