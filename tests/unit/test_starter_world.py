"""The starter's problems, traces and their judgement."""

from __future__ import annotations

import pytest

from orchestration.starter.world import (
    DIFFICULTIES,
    MAX_VALUE,
    LineKind,
    Operation,
    Problem,
    final_answer,
    first_wrong_step,
    generated,
    is_solved,
    judged,
    parsed_prompt,
    split_of,
)

# 7 +5 *3 -4: 7+5=12, 12*3=36, 36-4=32
CHAIN = Problem(
    start=7,
    operations=(
        Operation(symbol="+", operand=5),
        Operation(symbol="*", operand=3),
        Operation(symbol="-", operand=4),
    ),
)


def test_a_chain_is_applied_strictly_left_to_right() -> None:
    assert CHAIN.prompt == "7 +5 *3 -4"
    assert CHAIN.solution == "7+5=12\n12*3=36\n36-4=32\nanswer: 32"
    assert CHAIN.answer == 32


def test_the_same_seed_index_and_difficulty_give_the_same_problem() -> None:
    assert generated(3, 5, 4) == generated(3, 5, 4)
    assert len({generated(s, i, 4).prompt for s in range(3) for i in range(20)}) > 50


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_generated_problems_keep_every_running_value_in_range(difficulty: int) -> None:
    for index in range(300):
        problem = generated(0, index, difficulty)
        assert problem.difficulty == difficulty
        assert all(0 <= value <= MAX_VALUE for value in problem.values)
        assert all(1 <= op.operand <= 9 for op in problem.operations)
        assert all(2 <= op.operand <= 5 for op in problem.operations if op.symbol == "*")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_ground_truth_trace_verifies(difficulty: int) -> None:
    for index in range(100):
        problem = generated(1, index, difficulty)
        lines = judged(problem, problem.solution)
        assert all(line.correct for line in lines)
        assert [line.kind for line in lines] == [LineKind.STEP] * difficulty + [LineKind.ANSWER]
        assert is_solved(problem, problem.solution)


def test_a_prompt_parses_back_into_its_problem() -> None:
    for index in range(50):
        problem = generated(2, index, 6)
        assert parsed_prompt(problem.prompt) == problem


@pytest.mark.parametrize("text", ["", "7", "7 + 5", "7 +5 /2", "+5", "7 +55"])
def test_a_text_that_is_no_chain_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"7 \+5 \*3 -4"):
        parsed_prompt(text)


def test_a_problem_of_no_operations_is_refused() -> None:
    with pytest.raises(ValueError, match="difficulty >= 1"):
        generated(0, 0, 0)


@pytest.mark.parametrize(
    ("trace", "index"),
    [
        ("7+5=13\n13*3=39\n39-4=35\nanswer: 35", 0),  # a slip, continued consistently
        ("7+5=12\n12*3=37\n37-4=33\nanswer: 33", 1),
        ("7+5=12\n12*3=36\n36-4=31\nanswer: 31", 2),
        ("7+5=12\n12-4=8\nanswer: 8", 1),  # an operation left out
        ("7+5=12\n13*3=39\n", 1),  # true, but not what was reached
        ("7+5=12\n12*3=36\n36-4=32\n32+1=33\nanswer: 33", 3),  # an operation too many
    ],
)
def test_a_planted_wrong_step_is_found_at_its_index(trace: str, index: int) -> None:
    assert first_wrong_step(CHAIN, trace) == index


def test_steps_after_one_slip_count_as_right_when_they_continue_it() -> None:
    lines = judged(CHAIN, "7+5=13\n13*3=39\n39-4=35\nanswer: 35")
    assert [line.correct for line in lines] == [False, True, True, False]


def test_a_check_is_right_only_if_it_repeats_a_true_step_just_made() -> None:
    trace = "7+5=12\ncheck: 7+5=12\n12*3=35\ncheck: 12*3=35\ncheck: 7+5=12\ncheck: nothing"
    lines = judged(CHAIN, trace)
    assert [line.correct for line in lines] == [True, True, False, False, False, False]
    assert [line.kind for line in lines[3:]] == [LineKind.CHECK] * 3


def test_line_positions_cut_the_trace_without_a_gap() -> None:
    trace = "7+5=12\ncheck: 7+5=12\nhello\nanswer: 3"
    lines = judged(CHAIN, trace)
    assert "".join(trace[line.start : line.end] for line in lines) == trace
    assert [line.kind for line in lines][2] is LineKind.OTHER


@pytest.mark.parametrize(
    ("trace", "answer"),
    [
        ("answer: 32", 32),
        ("7+5=12\nanswer: 32", 32),
        ("answer: 32\n7+5=12", None),  # goes on after its answer
        ("7+5=12\n12*3=", None),  # cut off
        ("answer: ", None),
        ("", None),
    ],
)
def test_only_an_answer_on_the_last_line_counts(trace: str, answer: int | None) -> None:
    assert final_answer(trace) == answer


def test_a_lucky_guess_is_solved_but_its_answer_line_is_not_correct() -> None:
    assert is_solved(CHAIN, "answer: 32")
    assert not judged(CHAIN, "answer: 32")[0].correct


def test_the_split_is_a_property_of_the_prompt() -> None:
    for seed in range(3):
        for difficulty in DIFFICULTIES:
            assert split_of(generated(seed, 0, difficulty, split="train").prompt) == "train"
            assert split_of(generated(seed, 0, difficulty, split="heldout").prompt) == "heldout"
