"""The rules: what counts as the final answer and when it is right."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from reward_services.config import ScorerConfig
from reward_services.rules import built_rule


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
    with pytest.raises(ValidationError, match="found neither of rule and function"):
        ScorerConfig(name="answer")
    with pytest.raises(ValidationError, match="found both of rule and function"):
        ScorerConfig(name="answer", rule="exact", function="a.py:b")
