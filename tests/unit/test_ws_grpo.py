"""WS-GRPO: which prefixes are judged, the published numbers, every switch, and what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.algorithms import grpo, ws_grpo
from grpo.batch import build_batch
from grpo.describe import described
from grpo.step_preference import num_steps, prefix_utilities, step_preferences
from grpo.types import Group, Prompt, Score, Span
from tests.unit.grpo_groups import random_groups
from tests.unit.seed_groups import a_text_rollout, streams

PREFERENCES = [
    [0.6, 0.55, 0.52],
    [0.7, 0.4, 0.45, 0.5, 0.3, 0.35, 0.4],
    [0.5, 0.5],
    [0.62, 0.58, 0.6, 0.61],
]
OUTCOMES = {"answer": 1.0, "preference": 0.0}
RIGHT = [1.0, 1.0, 0.0, 0.0]
EXACT = {"std_ddof": 0, "std_eps": 0.0}


def built(**settings):
    config = ws_grpo.Config(**{"preference_scorer": "preference", "min_step_chars": 1, **settings})
    return ws_grpo.pipeline(config, outcomes=OUTCOMES, max_completion_length=99)


def a_group(preferences=PREFERENCES, outcomes=RIGHT, *, truncated=()):
    """Answers with one line per preference, judged as if a model had preferred them so."""
    rollouts = tuple(
        a_text_rollout(
            i, "\n".join(f"step {n}" for n in range(len(steps))), truncated=i in truncated
        )
        for i, steps in enumerate(preferences)
    )
    prompt = Prompt(id="p", text="?", tokens=np.arange(2, dtype=np.int32))
    group = Group(id=0, prompt=prompt, rollouts=rollouts)
    wanted = built().spans(group, ("answer", "preference"))
    values = [u for steps in preferences for u in utilities(steps)]
    scores = [
        Score(scorer="answer", span=span, value=value)
        for span, value in zip(wanted["answer"], outcomes, strict=True)
    ]
    scores += [
        Score(scorer="preference", span=span, value=value)
        for span, value in zip(wanted["preference"], values, strict=True)
    ]
    return replace(group, scores=tuple(scores))


def utilities(preferences):
    """Those of the prefixes of an answer whose steps are preferred so; the first is arbitrary."""
    if not preferences:
        return []
    p = np.array(preferences)
    return [0.3, *(0.3 + np.cumsum(np.log(p / (1 - p))))]


def rewards(group, **settings):
    terms = [reward(group, None) for reward in built(**settings).rewards]
    return np.sum(terms, axis=0)


def advantages(group, **settings):
    per_token = streams(built(**settings), group)[0]
    return [float(values[0]) for values in per_token]


def test_prefixes_run_from_nothing_to_the_whole_answer_and_no_scorer_is_asked_twice():
    group = a_group([[0.5, 0.5]], [1.0])
    asked = replace(group, scores=())
    wanted = built().spans(asked, ("answer", "preference"))
    # "step 0\nstep 1" and an end token: 14 tokens, the line break belongs to the first step.
    assert wanted["answer"] == (Span(rollout=0, start=0, end=14),)
    assert wanted["preference"] == tuple(Span(rollout=0, start=0, end=end) for end in (0, 7, 14))
    assert not any(built().spans(group, ("answer", "preference")).values())


def test_step_preferences_on_the_published_utilities_and_their_telescoping_sum():
    found = step_preferences(np.array([0, 0.4, 1.0, 0.7]), literal_order=False)
    assert found == pytest.approx([0.598688, 0.645656, 0.425557], abs=1e-6)
    assert found.mean() == pytest.approx(0.556634, abs=1e-6)
    assert np.log(found / (1 - found)).sum() == pytest.approx(0.7)
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 30):
        f = rng.normal(size=size + 1)
        p = step_preferences(f, literal_order=False)
        assert np.log(p / (1 - p)).sum() == pytest.approx(f[-1] - f[0])


def test_the_papers_argument_order_turns_every_preference_around():
    f = np.array([0, 0.4, 1.0, 0.7])
    both = [step_preferences(f, literal_order=literal) for literal in (False, True)]
    assert sum(both) == pytest.approx([1, 1, 1])


def test_rewards_and_advantages_on_the_published_group():
    group = a_group()
    assert rewards(group, range_penalty=0) == pytest.approx(
        [5.556667, 5.442857, 0.5, 0.6025], abs=1e-6
    )
    assert advantages(group, range_penalty=0, **EXACT) == pytest.approx(
        [1.022754, 0.976767, -1.020469, -0.979052], abs=1e-6
    )
    assert advantages(group, range_penalty=0) == pytest.approx(
        [0.8857, 0.845876, -0.883721, -0.847854], abs=1e-6
    )


def test_answers_outside_of_the_range_of_steps_pay_for_each_step():
    group = a_group()
    assert num_steps(group, min_chars=1).tolist() == [3, 7, 2, 4]
    assert rewards(group) == pytest.approx([5.556667, 4.942857, 0, 0.6025], abs=1e-6)
    assert advantages(group, **EXACT) == pytest.approx(
        [1.115645, 0.869419, -1.113377, -0.871688], abs=1e-6
    )
    assert rewards(group, range_penalty=1) == pytest.approx(
        [5.556667, 4.442857, -0.5, 0.6025], abs=1e-6
    )
    assert advantages(group, range_penalty=1, **EXACT) == pytest.approx(
        [1.19547, 0.756191, -1.19324, -0.758421], abs=1e-6
    )


def test_a_preference_model_that_knows_nothing_leaves_grpo():
    group = a_group([[0.5] * 3, [0.5] * 7, [0.5] * 2, [0.5] * 4])
    assert advantages(group, range_penalty=0, **EXACT) == pytest.approx([1, 1, -1, -1])


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_groups_of_equal_outcomes_are_told_apart_by_their_steps(outcome):
    group = a_group(outcomes=[outcome] * 4)
    expected = [0.519698, -1.378416, -0.425388, 1.284106]
    assert advantages(group, range_penalty=0, **EXACT) == pytest.approx(expected, abs=1e-6)
    assert advantages(group, ws_only_mixed=True) == [0, 0, 0, 0]


def test_mixed_groups_do_not_feel_ws_only_mixed():
    assert advantages(a_group(), ws_only_mixed=True) == advantages(a_group())


def test_an_answer_without_steps_is_neither_preferred_nor_not():
    group = a_group([[0.6, 0.6, 0.6], []], [1.0, 0.0])
    assert rewards(group, range_penalty=0) == pytest.approx([5.6, 0.5])
    assert rewards(group) == pytest.approx([5.6, 0.5 - 0.5 * 3])


def test_a_sum_over_steps_pays_for_every_further_step():
    group = a_group([[0.5] * 3, [0.5] * 5], [1.0, 1.0])
    sums = rewards(group, range_penalty=0, step_reduction="sum")
    assert sums == pytest.approx([6.5, 7.5])
    assert rewards(group, range_penalty=0) == pytest.approx([5.5, 5.5])


def test_a_cut_off_answer_is_wrong_but_keeps_its_preference():
    group = a_group(outcomes=[1.0] * 4, truncated=(0,))
    found = rewards(group, range_penalty=0)
    assert found[0] == pytest.approx(0.556667, abs=1e-6)
    assert rewards(group, range_penalty=0, truncated_is_wrong=False)[0] == pytest.approx(
        5.556667, abs=1e-6
    )


def test_what_was_not_judged_gets_no_reward_at_all():
    group = a_group()
    unjudged = {("answer", 1), ("preference", 2)}
    scores = [
        replace(s, value=None) if (s.scorer, s.span.rollout) in unjudged else s
        for s in group.scores
    ]
    found = rewards(replace(group, scores=tuple(scores)))
    assert np.isnan(found).tolist() == [False, True, True, False]
    assert advantages(replace(group, scores=tuple(scores)))[1:3] == [0, 0]


def test_the_utility_of_a_whole_answer_is_no_part_of_its_reward():
    group = a_group()
    shifted = [
        replace(s, value=s.value + 7) if s.scorer == "preference" else s for s in group.scores
    ]
    assert rewards(replace(group, scores=tuple(shifted))) == pytest.approx(rewards(group))


def test_prefixes_may_come_in_any_order():
    group = a_group()
    found = prefix_utilities(replace(group, scores=group.scores[::-1]), scorer="preference")
    for one, other in zip(found, prefix_utilities(group, scorer="preference"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_metrics_say_whether_the_preference_model_rewards_right_answers():
    pipeline = built()
    group = a_group()
    built_step = build_batch(pipeline, [group], None, step=0, version=0, num_updates=1)
    assert built_step.metrics["steps/mean"] == 4
    assert built_step.metrics["steps/frac_out_of_range"] == 0.5
    means = [np.mean(steps) for steps in PREFERENCES]
    assert built_step.metrics["step_preference/outcome_correlation"] == pytest.approx(
        np.corrcoef(means, RIGHT)[0, 1]
    )
    # Without the judgements of two answers: means 0.5567 of a right and 0.6025 of a wrong one.
    missing = {("answer", 1), ("preference", 2)}
    scores = [
        replace(s, value=None) if (s.scorer, s.span.rollout) in missing else s for s in group.scores
    ]
    partly = replace(group, scores=tuple(scores))
    found = build_batch(pipeline, [partly], None, step=0, version=0, num_updates=1).metrics
    assert found["step_preference/outcome_correlation"] == pytest.approx(-1)
    constant = a_group(outcomes=[1.0] * 4)
    found = build_batch(pipeline, [constant], None, step=0, version=0, num_updates=1).metrics
    assert "step_preference/outcome_correlation" not in found


def test_without_its_own_parts_it_is_grpo_to_the_last_bit():
    neutral = {"outcome_coef": 1.0, "range_penalty": 0.0, "truncated_is_wrong": False}
    ours = ws_grpo.Config(**neutral)
    halves = [
        (m.pipeline(c, outcomes={"answer": 1.0}, max_completion_length=9), m.objective(c))
        for m, c in ((ws_grpo, ours), (grpo, grpo.Config()))
    ]
    left, right = (dict(described(*pair)) for pair in halves)
    assert {p for p in left if left[p] != right[p]} == {"rewards", "metrics"}
    groups = random_groups(0, num_groups=3, num_generations=8)
    (mine,), (theirs,) = (
        build_batch(p, groups, None, step=0, version=0, num_updates=1).batch.updates
        for p, _ in halves
    )
    for row, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(row.advantages, other.advantages)
        np.testing.assert_array_equal(row.weights, other.weights)


def test_settings_that_cannot_be_meant_are_refused_with_the_remedy():
    with pytest.raises(ValidationError, match="min_steps is 7, above max_steps 6"):
        ws_grpo.Config(min_steps=7)
    with pytest.raises(ValueError, match=r"algorithm.preference_scorer is 'prefs'.*found: answer"):
        built(preference_scorer="prefs")
    with pytest.raises(ValueError, match="nothing says which answers are right"):
        ws_grpo.pipeline(
            ws_grpo.Config(preference_scorer="preference"),
            outcomes={"preference": 1.0},
            max_completion_length=9,
        )
