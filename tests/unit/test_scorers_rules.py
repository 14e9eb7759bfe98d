"""The rules: what counts as the final answer and when it is right."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from reward_services.config import ScorerConfig
from reward_services.form_rules import FormRule, built_form_rule
from reward_services.rules import built_rule, marked_answer


def _numeric(**options: object) -> ScorerConfig:
    return ScorerConfig.model_validate({"name": "answer", "rule": "numeric", **options})


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("7+5=12\nanswer: 12", "12"),
        ("12-5", "5"),  # the minus stands between operands
        ("it drops to -5", "-5"),
        ("so it costs $1,234.50 in total.", "1234.5"),
        ("answer: x = 42 apples in 3 boxes", "42"),
        ("Answer:\n42", "42"),
        ("**Answer:** -3", "-3"),
        ("the answer is \\boxed{\\frac{1}{2}}", "0.5"),
        ("#### 18", "16 - 3 - 4 = 9; 9 * 2 = 18 #### 18"),
        ("10\\,000", "10,000"),
        ("12%", "12"),
        ("1e3", "1000"),
        ("\u22124", "-4"),
    ],
)
def test_a_number_is_read_as_a_person_would(completion: str, reference: str) -> None:
    assert built_rule(_numeric())(completion, reference) == 1.0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("answer: 12\n", "13"),
        ("12 is wrong, answer: 13", "12"),  # the marked answer counts, not the first number
        ("no number at all", "3"),
        ("", "0"),
        ("answer: ", "0"),  # cut off
        ("answer: 1000001", "1000000"),  # exact, not within a tolerance
    ],
)
def test_another_number_or_none_is_wrong(completion: str, reference: str) -> None:
    assert built_rule(_numeric())(completion, reference) == 0.0


def test_without_a_marker_the_last_number_counts_only_if_allowed() -> None:
    trace = "7+5=12"
    assert built_rule(_numeric())(trace, "12") == 1.0
    assert built_rule(_numeric(require_marker=True))(trace, "12") == 0.0


def test_a_pattern_replaces_the_markers_and_its_last_match_counts() -> None:
    rule = built_rule(_numeric(pattern=r"<a>(\d+)</a>"))
    assert rule("<a>1</a> <a>2</a> answer: 3", "2") == 1.0
    assert rule("answer: 2", "2") == 0.0


def test_a_reference_without_a_number_is_an_error_and_not_a_score() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        built_rule(_numeric())("answer: 2", "two")


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("the answer is Paris.", "paris", 1.0),
        ("I think so\n**Paris**\n", " Paris ", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_text_is_compared_without_case_space_and_edges(
    completion: str, reference: str, score: float
) -> None:
    rule = built_rule(ScorerConfig(name="answer", rule="exact"))
    assert rule(completion, reference) == score


def test_a_scorer_needs_exactly_one_judge() -> None:
    with pytest.raises(ValidationError, match="found none of rule, function, code"):
        ScorerConfig(name="answer")
    with pytest.raises(ValidationError, match="found rule and function; expected exactly one"):
        ScorerConfig(name="answer", rule="exact", function="a.py:b")


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("the answer is $x = \\sqrt{8}$", "2\\sqrt{2}", 1.0),
        ("$(1, 2) \\cup [3, 4]$", "$(1,2)\\cup[3,4]$", 1.0),
        ("I get $\\{3, 1, 2\\}$", "\\{1,2,3\\}", 1.0),
        ("it equals $(x+1)^2$", "$x^2 + 2x + 1$", 1.0),
        ("the answer is $x^2 + 1$", "$x^2 + 2x + 1$", 0.0),
        ("I do not know", "7", 0.0),
        ("", "7", 0.0),
        ("answer: 1/3", "\\frac13", 1.0),
    ],
)
def test_mathematics_is_compared_by_meaning(completion: str, reference: str, score: float) -> None:
    rule = built_rule(ScorerConfig(name="answer", rule="math"))
    assert rule(completion, reference) == score


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("The answer is (B).", "B", 1.0),
        ("A looks right, but it is C", "(C) Paris", 1.0),
        ("Answer: b)", "B", 0.0),  # a bare small letter is no choice
        ("answer: (b)", "B", 1.0),
        ("It is a city. I think so.", "A", 0.0),
        ("A person would say D.", "D", 1.0),
        ("\\boxed{A}", "A", 1.0),
        ("none", "A", 0.0),
    ],
)
def test_the_last_choice_named_counts(completion: str, reference: str, score: float) -> None:
    rule = built_rule(ScorerConfig(name="answer", rule="choice"))
    assert rule(completion, reference) == score


def test_a_reference_without_a_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no choice"):
        built_rule(ScorerConfig(name="answer", rule="choice"))("B", "the second")


def _form(**options: object) -> FormRule:
    return built_form_rule(ScorerConfig.model_validate({"name": "form", **options}))


def test_a_pattern_has_to_occur() -> None:
    rule = _form(rule="regex", pattern=r"(?s)\A<think>.*</think>\s*<answer>.*</answer>\s*\Z")
    assert rule("<think>a\nb</think>\n<answer>4</answer>", 9) == 1.0
    assert rule("well, <think>a</think><answer>4</answer>", 9) == 0.0


def test_length_falls_from_one_to_zero_over_the_slack() -> None:
    rule = _form(rule="length", min_length=10, max_length=100, length_slack=50)
    # 125 is 25 of 50 above the longest: 0.5; 5 is 5 of 50 below the shortest: 0.9.
    assert [rule("", n) for n in (10, 100, 125, 150, 151, 5)] == [1, 1, 0.5, 0, 0, 0.9]
    strict = _form(rule="length", max_length=2, length_unit="words")
    assert [strict("a b", 99), strict("a b c", 1)] == [1.0, 0.0]


def test_repetition_is_the_share_of_distinct_phrases() -> None:
    rule = _form(rule="repetition", ngram=2)
    assert rule("a b a b", 4) == pytest.approx(2 / 3)  # (a b), (b a), (a b)
    assert rule("a b c d", 4) == 1.0
    assert rule("a", 1) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "numeric", "ngram": 2}, "ngram belongs to the rules repetition"),
        ({"rule": "length", "pattern": "x"}, "pattern belongs to the rules"),
        ({"rule": "regex"}, "rule regex needs a pattern"),
        ({"rule": "length", "min_length": 3, "max_length": 2}, "lies below min_length"),
        ({"rule": "exact", "options": {"a": 1}}, "options are a function's"),
        ({"rule": "exact", "token_env": "T"}, "token_env belongs to url"),
        ({"url": "localhost:5000"}, "should match pattern"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ScorerConfig.model_validate({"name": "answer", **settings})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("answer: " * 20_000, "answer:"),  # no recursion, and no quadratic time
        ("the answer is " * 20_000 + "7", "7"),
        ("answer: 5\nanswer:", "5"),
        ("answer: the answer is 7", "7"),
        ("\\boxed{7}\nanswer: ", "7"),
        ("answer:\n 5", "5"),
        ("answer:", ""),
        ("none", None),
    ],
)
def test_the_last_marker_that_marks_something_counts(text, answer):
    assert marked_answer(text) == answer
