"""Cutting completions into steps."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from grpo.steps import step_ends, step_spans
from grpo.types import Span
from reward_services.batches import span_text
from tests.unit.seed_groups import a_rollout, a_text_rollout


def pieces(text, *, min_chars=1):
    ends = (0, *step_ends(text, min_chars=min_chars))
    return [text[start:end] for start, end in pairwise(ends)]


def test_blank_lines_come_before_lines_and_lines_before_sentences():
    assert pieces("one. two\nthree\n\nfour. five") == ["one. two\nthree\n\n", "four. five"]
    assert pieces("one. two\nthree. four") == ["one. two\n", "three. four"]
    assert pieces("It is 3.5. Add 2! So? yes") == ["It is 3.5. ", "Add 2! ", "So? ", "yes"]
    assert pieces("a word") == ["a word"]


def test_separators_at_the_edges_make_no_steps():
    assert pieces("\n\none\ntwo\n\n") == ["\n\none\n", "two\n\n"]
    assert pieces("   \n ") == pieces("") == []


@pytest.mark.parametrize(
    "answer",
    [
        "answer: 32",
        "Answer: 32",
        "**Final answer:** 32",
        "The answer is 32.",
        "#### 32",
        "\\boxed{32}",
    ],
)
def test_the_final_answer_belongs_to_the_last_step(answer):
    assert pieces(f"7+5=12\n12*3=36\n{answer}") == ["7+5=12\n", f"12*3=36\n{answer}"]


def test_an_answer_alone_is_one_step_and_answers_in_between_are_steps():
    assert pieces("answer: 32") == ["answer: 32"]
    assert pieces("the answer needs two steps\n3+4=7") == ["the answer needs two steps\n", "3+4=7"]


def test_short_fragments_join_the_next_step_and_a_short_last_one_the_step_before():
    text = "ok\nfirst we add\nthen we multiply\nhm"
    assert pieces(text, min_chars=8) == ["ok\nfirst we add\n", "then we multiply\nhm"]
    assert pieces("a\nb\nc", min_chars=8) == ["a\nb\nc"]


def test_what_follows_the_reasoning_part_is_no_step_of_its_own():
    text = "first part\n\nsecond part\n\n</think>\n\nWe find that\n\nit is 7"
    assert pieces(text) == ["first part\n\n", text.removeprefix("first part\n\n")]
    assert pieces("</think> it is 7") == ["</think> it is 7"]


def test_steps_in_tokens_follow_each_other_and_leave_nothing_out():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab. \n\n") for _ in range(rng.randrange(30)))
        widths = [rng.randrange(1, 5) for _ in range(30)]
        ends = np.minimum(np.cumsum(widths), len(text)).astype(np.int32)
        cut = int(np.searchsorted(ends, len(text))) + 2  # the text's last token and one more
        rollout = a_rollout(0, range(cut), text=text)
        rollout = type(rollout)(
            **{f: getattr(rollout, f) for f in rollout.__slots__} | {"token_ends": ends[:cut]}
        )
        spans = step_spans(rollout, 3, min_chars=1)
        if not text.strip():
            assert spans == ()
            continue
        assert spans[0].start == 0 and spans[-1].end == cut
        assert all(a.end == b.start for a, b in pairwise(spans))
        assert all(span.rollout == 3 and span.start < span.end for span in spans)
        assert len(spans) <= len(step_ends(text, min_chars=1))


def test_step_spans_hold_the_text_of_their_steps_and_the_last_one_the_end_of_sequence():
    rollout = a_text_rollout(0, "7+5=12\n12*3=36\nanswer: 36")
    spans = step_spans(rollout, 0, min_chars=1)
    assert [span_text(rollout, span) for span in spans] == ["7+5=12\n", "12*3=36\nanswer: 36"]
    assert spans[-1].end == rollout.num_tokens == len(rollout.text) + 1


def test_a_token_across_a_boundary_belongs_to_the_step_that_it_begins_in():
    rollout = a_rollout(0, [1, 2, 3], text="ab\ncd")
    ends = np.array([1, 4, 5], np.int32)  # "a", "b\nc", "d"
    rollout = type(rollout)(
        **{f: getattr(rollout, f) for f in rollout.__slots__} | {"token_ends": ends}
    )
    assert [(s.start, s.end) for s in step_spans(rollout, 0, min_chars=1)] == [(0, 2), (2, 3)]


def test_a_step_span_of_the_first_token_alone_is_the_first_character():
    rollout = a_text_rollout(0, "ab")
    assert span_text(rollout, Span(rollout=0, start=0, end=1)) == "a"
