"""GRPO-CARE: who earns the bonus, where the answer stands, and what moves the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo.advantage import standardized_values
from grpo.consistency import (
    answer_tokens,
    consistency_bonus,
    consistency_metrics,
    likelihoods,
    rewarded_accuracy,
)
from grpo.objective import ReferenceUpdate, Signal
from grpo.pipeline import RewardedGroup
from tests.unit.family_cases import differing_points, halves, points, rows_of
from tests.unit.grpo_groups import scored
from tests.unit.seed_groups import a_rollout, a_text_rollout

NAN = float("nan")
TAGS = {"opening": "<a>", "closing": "</a>"}
SETTINGS = {"scorer": "answer", "coefficient": 0.5, "cap": 0.95, **TAGS}


def answered(*answers, accuracy):
    """Answers of one character each, with the reference's probability of that character."""
    rollouts = []
    for index, p in enumerate(answers):
        rollout = a_text_rollout(index, "so <a>7</a>" if p is not None else "so 7")
        stream = np.full(rollout.num_tokens, -9.0, np.float32)
        stream[6:7] = 0.0 if p is None else np.log(p)
        rollouts.append(replace(rollout, measured={"reference": stream}))
    return scored(rollouts, answer=list(accuracy))


@pytest.mark.parametrize(
    ("accuracy", "likelihood", "margin", "expected"),
    [
        ([1, 1, 0, 1], [0.95, 0.7, 0.95, 0.8], 0.0, [1, 0, 0, 0]),
        ([1, 1, 0, 1], [0.95, 0.7, 0.95, 0.8], 0.02, [1, 0, 0, 1]),
        ([0, 0, 0, 0], [0.9] * 4, 0.0, [0] * 4),
        ([0.1, 0.1], [0.9, 0.8], 0.0, [0, 0]),  # not above 0.1
        ([1, 0.5, 0.5], [0.5, 0.9, 0.9], 0.0, [1, 0, 0]),  # below the mean accuracy
        ([1, 1], [0.8, 0.8], 0.0, [1, 1]),  # a tie is likely
        ([1, 1], [NAN, 0.3], 0.0, [0, 1]),  # no answer in its markers
        ([1, 1], [NAN, NAN], 0.0, [0, 0]),
        ([1, NAN], [0.9, 0.9], 0.0, [1, NAN]),
        ([NAN, NAN], [0.9, 0.9], 0.0, [NAN, NAN]),
    ],
)
def test_likely_right_answers_earn_their_accuracy_again(accuracy, likelihood, margin, expected):
    found = rewarded_accuracy(np.array(accuracy, float), np.array(likelihood, float), margin=margin)
    np.testing.assert_array_equal(found, expected)


def test_bonus_total_and_advantage_are_those_worked_by_hand():
    group = answered(0.99, 0.7, 0.98, 0.8, accuracy=[1, 1, 0, 1])
    bonus = consistency_bonus(group, None, margin=0.0, **SETTINGS)
    np.testing.assert_allclose(bonus, [0.5, 0, 0, 0])
    total = np.array([1, 1, 0, 1]) + 1.0 + bonus
    np.testing.assert_allclose(total, [2.5, 2, 1, 2])
    np.testing.assert_allclose(
        standardized_values(total, ddof=1, eps=1e-4),
        [0.993241, 0.198648, -1.390538, 0.198648],
        atol=1e-6,
    )
    near = consistency_bonus(group, None, margin=0.02, **SETTINGS)
    np.testing.assert_allclose(near, [0.5, 0, 0, 0.5])


def test_the_cap_makes_ties_of_very_likely_answers():
    group = answered(0.99, 0.96, accuracy=[1, 1])
    assert consistency_bonus(group, None, margin=0.0, **SETTINGS).tolist() == [0.5, 0.5]
    uncapped = consistency_bonus(group, None, margin=0.0, **(SETTINGS | {"cap": 1.0}))
    assert uncapped.tolist() == [0.5, 0.0]


def test_the_likelihood_of_an_answer_is_a_geometric_mean():
    rollout = a_text_rollout(0, "<a>42</a>")
    stream = np.full(rollout.num_tokens, -5.0, np.float32)
    stream[3:5] = [-0.1, -0.3]
    group = scored([replace(rollout, measured={"reference": stream})], answer=[1])
    assert likelihoods(group, **TAGS)[0] == pytest.approx(0.8187307530779818, abs=1e-7)


@pytest.mark.parametrize(
    ("text", "closing", "expected"),
    [
        ("<a>42</a>", "</a>", "42"),
        ("<a>1</a> no: <a>7</a>!", "</a>", "7"),
        ("<a>42", "</a>", "42"),
        ("<a>42</a>", None, "42</a>"),
        ("42", "</a>", ""),
        ("<a></a>", "</a>", ""),
    ],
)
def test_the_answer_stands_between_the_last_markers(text, closing, expected):
    rollout = a_text_rollout(0, text)  # one token a character, then the end
    inside = answer_tokens(rollout, opening="<a>", closing=closing)
    assert "".join(chr(t) for t in rollout.tokens[inside]) == expected
    assert not inside[-1]  # the end of sequence has no characters


def test_a_token_that_reaches_across_a_marker_is_no_part_of_the_answer():
    rollout = a_text_rollout(0, "<a>42</a>")
    merged = replace(rollout, tokens=rollout.tokens[:3], token_ends=np.array([3, 5, 9], np.int32))
    merged = replace(merged, origins=merged.origins[:3], log_probs=merged.log_probs[:3])
    assert answer_tokens(merged, **TAGS).tolist() == [False, True, False]
    across = replace(merged, token_ends=np.array([3, 6, 9], np.int32))
    assert not answer_tokens(across, **TAGS).any()


def test_given_tokens_are_no_part_of_the_answer():
    rollout = a_rollout(0, list(range(7)), guidance=4, text="<a>42</")
    inside = answer_tokens(rollout, opening="<a>", closing="</")
    assert np.flatnonzero(inside).tolist() == [4]


def test_an_answer_without_markers_earns_nothing_and_is_counted():
    group = answered(None, 0.5, accuracy=[1, 1])
    assert consistency_bonus(group, None, margin=0.0, **SETTINGS).tolist() == [0.0, 0.5]
    rewarded = RewardedGroup(group=group, components=np.zeros((2, 1)))
    assert consistency_metrics([rewarded], None, **TAGS) == {
        "consistency/frac_marked": 0.5,
        "consistency/likelihood": pytest.approx(0.5),
    }


def test_without_a_bonus_it_is_grpo():
    assert points("grpo_care", bonus_coef=0) == points("grpo")


def test_the_bonus_is_a_reward_and_its_reference_moves():
    assert differing_points(
        points("grpo_care"), points("grpo") | dict.fromkeys(("reference_update",))
    ) == {"rewards", "measures", "metrics", "reference_update"}
    pipeline, objective = halves("grpo_care", answer_opening="<a>", answer_closing="</a>")
    assert objective.reference_update == ReferenceUpdate(every=10, decay=0.995)
    assert objective.measures[0].needs == {Signal.REFERENCE}
    assert halves("grpo_care", reference_decay=1.0)[1].reference_update is None
    group = answered(0.99, 0.7, 0.98, 0.8, accuracy=[1, 1, 0, 1])
    rows = rows_of(pipeline, [group])
    assert rows[0].advantages[0] > rows[1].advantages[0] == rows[3].advantages[0] > 0


def test_the_accuracy_is_that_of_the_scorer_that_is_named():
    rewards = points("grpo_care", outcomes={"answer": 1.0, "form": 2.0}, outcome_scorer="answer")[
        "rewards"
    ]
    assert any("consistency_bonus(scorer='answer'" in text for text in rewards)
