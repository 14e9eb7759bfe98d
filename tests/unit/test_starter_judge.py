"""What the starter's judge is trained on: labels of the rule, in the words of a scorer."""

from __future__ import annotations

import random

import pytest

from orchestration.starter.judge_build import agreement
from orchestration.starter.judge_data import drawn_trace, labelled, question_and_reply
from orchestration.starter.judge_training import judge_tokenizer, labelled_row
from orchestration.starter.tokenizer import built_tokenizer
from orchestration.starter.training import IGNORED
from orchestration.starter.world import parsed_prompt

PROBLEM = parsed_prompt("7 +5 *3 -4")


@pytest.mark.parametrize(
    ("text", "first_wrong"),
    [
        ("7+5=12\n12*3=36\n36-4=32\nanswer: 32", None),
        ("7+5=12\n12*3=37\n37-4=33\nanswer: 33", 2),
        ("7+5=13\n13*3=39", 1),
        ("answer: 50", None),  # no step that the rule can judge
    ],
)
def test_a_label_is_the_rules_first_wrong_step(text: str, first_wrong: int | None) -> None:
    assert labelled(PROBLEM, text).first_wrong == first_wrong


def test_question_and_reply_are_those_of_a_scorer() -> None:
    trace = labelled(PROBLEM, "7+5=12\n12*3=37\nanswer: 37")
    asked, reply = question_and_reply(trace, with_reference=True)
    steps = "[1] 7+5=12\n[2] 12*3=37\nanswer: 37"
    assert asked == f"7 +5 *3 -4\n{PROBLEM.solution}\n\n{steps}"
    assert reply == '{"first_wrong_step":2}'
    assert PROBLEM.solution not in question_and_reply(trace, with_reference=False)[0]


def test_the_judges_tokens_begin_with_the_starters() -> None:
    starter, judge = built_tokenizer().get_vocab(), judge_tokenizer().get_vocab()
    assert {token: judge[token] for token in starter} == starter
    text = '{"first_wrong_step":null}'
    assert judge_tokenizer().decode(judge_tokenizer()(text)["input_ids"]) == text


def test_a_row_says_at_the_end_of_each_step_what_is_wrong_so_far() -> None:
    tokenizer = judge_tokenizer()
    trace = labelled(PROBLEM, "7+5=12\n12*3=37\n37-4=33")
    row = labelled_row(tokenizer, trace, with_reference=True, written_weight=0.0)
    assert len(row.ids) == len(row.labels) == len(row.weights)
    said = [
        tokenizer.decode([label])
        for label, weight in zip(row.labels, row.weights, strict=True)
        if weight and label != IGNORED
    ]
    assert said == ["null", "2", "2", '{"first_wrong_step":', "2", "}", "<|eos|>"]


def test_traces_are_seeded_and_of_their_split() -> None:
    def drawn(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [
            drawn_trace(rng, i, seed=seed, split="heldout", cut_off=str.strip).text
            for i in range(5)
        ]

    assert drawn(1) == drawn(1) != drawn(2)


def test_agreement_counts_finding_nothing_as_an_answer() -> None:
    found = agreement([1, None, 3, 2], [1, None, 2, None])
    assert (found.exact, found.exact_wrong, found.off_by_one) == (0.5, 0.5, 0.5)
    assert (found.always_none, found.num_wrong_steps) == (0.5, 2)
