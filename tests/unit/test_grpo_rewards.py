"""Reward terms, selection on raw outcomes, plans, spans and masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo.algorithms import dapo
from grpo.plans import independent
from grpo.rewards import soft_overlong, weighted_outcome
from grpo.selection import drop_if_constant_outcome
from grpo.spans import whole_answer
from grpo.token_weights import not_truncated, policy_tokens_only
from grpo.types import Dropped, Score, Span
from tests.unit.grpo_groups import rollout, scored


def four(**outcomes):
    return scored([rollout(i, i + 1) for i in range(4)], **outcomes)


def test_an_outcome_is_weighted_and_absent_where_the_scorer_does_not_apply():
    group = four(answer=[1.0, 0.0, None, 0.5])
    found = weighted_outcome(group, None, scorer="answer", weight=2.0)
    np.testing.assert_array_equal(found, [2.0, 0.0, np.nan, 1.0])


def test_scores_of_parts_of_an_answer_are_no_outcomes():
    group = scored([rollout(0, 3)])
    part = Score(scorer="answer", span=Span(rollout=0, start=0, end=2), value=1.0)
    group = type(group)(id=0, prompt=group.prompt, rollouts=group.rollouts, scores=(part,))
    assert np.isnan(weighted_outcome(group, None, scorer="answer", weight=1.0)).all()


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)]
)
def test_the_length_penalty_grows_over_the_cache_and_stays_at_minus_one(length, penalty):
    group = scored([rollout(0, length)], answer=[1.0])
    found = soft_overlong(group, None, max_tokens=100, cache_tokens=20)
    np.testing.assert_allclose(found, [penalty], atol=1e-15)


def test_a_rollout_that_no_scorer_judged_gets_no_length_penalty_as_its_reward():
    group = scored([rollout(0, 5), rollout(1, 100)], answer=[1.0, None])
    found = soft_overlong(group, None, max_tokens=100, cache_tokens=20)
    np.testing.assert_array_equal(found, [0.0, np.nan])


@pytest.mark.parametrize(
    ("outcomes", "is_kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], False),
        ([0.0, 1.0, 0.0, 0.0], True),
        ([0.0, 1.0, 1.0, 0.0], True),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([0.1 + 0.2, 0.3, 0.3, 0.3], False),  # differ by round-off
        ([1.0, None, 1.0, None], False),
        ([1.0, None, 0.0, None], True),
        ([1.0, None, None, None], False),
        ([None, None, None, None], False),
    ],
)
def test_only_a_group_with_different_outcomes_is_kept(outcomes, is_kept):
    group = four(answer=outcomes)
    selected = drop_if_constant_outcome(group, None, scorers=("answer",))
    if is_kept:
        assert selected is group
    else:
        assert isinstance(selected, Dropped)
        assert (selected.group, selected.prompt) == (group.id, group.prompt.id)
        assert selected.reason == "constant_outcome"


def test_a_group_is_kept_if_one_of_its_scorers_tells_answers_apart():
    group = four(answer=[1.0] * 4, style=[0.2, 0.2, 0.4, 0.2])
    assert drop_if_constant_outcome(group, None, scorers=("answer", "style")) is group
    assert isinstance(drop_if_constant_outcome(group, None, scorers=("answer",)), Dropped)


def test_a_length_penalty_does_not_save_an_all_correct_group_from_being_dropped():
    group = scored([rollout(0, 81), rollout(1, 99)], answer=[1.0, 1.0])
    pipeline = dapo.pipeline(
        dapo.Config(soft_overlong_cache=20), outcomes={"answer": 1.0}, max_completion_length=100
    )
    shaped = sum(reward(group, None) for reward in pipeline.rewards)
    assert shaped[0] > shaped[1]
    assert isinstance(pipeline.select[0](group, None), Dropped)


def test_independent_rollouts_are_asked_for_once_from_the_plain_prompt():
    empty = scored([])
    plans = independent(empty, None, num_generations=3)
    assert len(plans) == 3
    assert all(plan.text is None and len(plan.guidance) == 0 for plan in plans)
    assert independent(four(), None, num_generations=3) == ()


def test_every_scorer_judges_every_whole_answer_once():
    group = scored([rollout(0, 7), rollout(1, 2)])
    spans = (Span(rollout=0, start=0, end=7), Span(rollout=1, start=0, end=2))
    assert whole_answer(group, ("a", "b")) == {"a": spans, "b": spans}
    half = scored([rollout(0, 7)], a=[1.0])
    assert whole_answer(half, ("a", "b")) == {"a": (), "b": spans[:1]}


def test_answers_that_are_new_or_have_grown_are_the_only_ones_judged_in_a_later_wave():
    before = scored([rollout(0, 7), rollout(1, 2)], a=[1.0, 0.0])
    grown = replace(before, rollouts=(rollout(0, 7), rollout(1, 4), rollout(2, 3)))
    assert whole_answer(grown, ("a",)) == {
        "a": (Span(rollout=1, start=0, end=4), Span(rollout=2, start=0, end=3))
    }


def test_masks_leave_out_given_tokens_and_answers_that_were_cut_off():
    group = scored([rollout(0, 3, guidance=2), rollout(1, 2, truncated=True)])
    assert [m.tolist() for m in policy_tokens_only(group, None)] == [
        [False, False, True],
        [True] * 2,
    ]
    assert [m.tolist() for m in not_truncated(group, None)] == [[True] * 3, [False] * 2]
