"""Process-supervision GRPO and PRIME: numbers worked by hand, steps in place, degenerate groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from grpo import process_advantage, process_spans, selection
from grpo.objective import ReferenceUpdate
from grpo.pipeline import RewardedGroup
from grpo.types import Dropped, Group, Score, Span
from tests.unit.family_cases import differing_points, halves, points, rows_of
from tests.unit.grpo_groups import random_groups, rollout, scored
from tests.unit.seed_groups import a_text_rollout
from tests.unit.tree_groups import grown

TWO = {"answer": 1.0, "steps": 0.0}
PRM = {"num_generations": 2, "step_scorer": "steps", "std_ddof": 0, "std_eps": 0.0}


def with_steps(group: Group, *steps: tuple[int, int, int, float | None]) -> Group:
    """Scores (rollout, start, end, value) by the scorer `steps`."""
    scores = [
        Score(scorer="steps", span=Span(rollout=r, start=start, end=end), value=value)
        for r, start, end, value in steps
    ]
    return replace(group, scores=(*group.scores, *scores))


def two_answers() -> Group:
    """Steps (0.2, 0.8) that end at tokens 1, 3 of 4, and (0.5, 0.5, 0.1) at 0, 2, 4 of 6."""
    group = scored([rollout(0, 4), rollout(1, 6)], answer=[1.0, 0.0])
    return with_steps(
        group, (0, 0, 2, 0.2), (0, 2, 4, 0.8), (1, 0, 1, 0.5), (1, 1, 3, 0.5), (1, 3, 5, 0.1)
    )


def rewarded(group: Group) -> RewardedGroup:
    values = [np.nan if v is None else v for v in group.outcomes("answer")]
    return RewardedGroup(group=group, components=np.array(values, np.float64)[:, None])


def process(group: Group, *, ddof=0, outcome_coef=0.0, eps=0.0):
    return process_advantage.process_standardized(
        [rewarded(group)], None, scorer="steps", outcome_coef=outcome_coef, ddof=ddof, eps=eps
    )[0]


@pytest.mark.parametrize(
    ("ddof", "first", "second"),
    [
        (
            0,
            [0.644658, 0.644658, 1.531064, 1.531064],
            [-0.644658, -0.966988, -0.966988, -1.289317, -1.289317, 0],
        ),
        (
            1,
            [0.5766, 0.5766, 1.369425, 1.369425],
            [-0.5766, -0.8649, -0.8649, -1.1532, -1.1532, 0],
        ),
    ],
)
def test_process_supervision_sums_standardised_steps_to_the_right(ddof, first, second):
    found = process(two_answers(), ddof=ddof)
    np.testing.assert_allclose(found[0], first, atol=1e-6)
    np.testing.assert_allclose(found[1], second, atol=1e-6)


def test_one_step_per_answer_at_its_end_is_grpo():
    group = with_steps(
        scored([rollout(0, 3), rollout(1, 5)], answer=[1.0, 0.0]), (0, 0, 3, 1.0), (1, 0, 5, 0.0)
    )
    found = process(group)
    np.testing.assert_allclose(found[0], 1.0)
    np.testing.assert_allclose(found[1], -1.0)


def test_many_good_steps_are_worth_more_than_one():
    group = scored([rollout(0, 4), rollout(1, 1), rollout(2, 1)], answer=[1.0, 1.0, 0.0])
    steps = [(0, t, t + 1, 0.9) for t in range(4)]
    found = process(with_steps(group, *steps, (1, 0, 1, 0.9), (2, 0, 1, 0.1)))
    firsts = [row[0] for row in found]
    np.testing.assert_allclose(firsts, [1.788854, 0.447214, -2.236068], atol=1e-6)


def test_equal_steps_and_missing_steps_teach_exactly_nothing():
    group = scored([rollout(0, 4), rollout(1, 3)], answer=[1.0, 0.0])
    assert not any(row.any() for row in process(group))
    equal = with_steps(group, (0, 0, 2, 0.3), (0, 2, 4, 0.3), (1, 0, 3, 0.3))
    assert not any(row.any() for row in process(equal))


def test_a_step_that_was_not_judged_counts_nowhere():
    judged = with_steps(
        scored([rollout(0, 4), rollout(1, 4)], answer=[1.0, 0.0]), (0, 0, 2, 1.0), (1, 0, 4, 0.0)
    )
    with_none = with_steps(judged, (0, 2, 4, None))
    for mine, theirs in zip(process(judged), process(with_none), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert process(judged)[0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_an_order_of_answers_changes_no_advantage():
    group = two_answers()
    turned = replace(
        group,
        rollouts=group.rollouts[::-1],
        scores=tuple(
            replace(s, span=replace(s.span, rollout=1 - s.span.rollout)) for s in group.scores
        ),
    )
    for mine, theirs in zip(process(group), process(turned)[::-1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_the_outcome_is_added_where_it_is_asked_for():
    plain, both = process(two_answers()), process(two_answers(), outcome_coef=0.5)
    np.testing.assert_allclose(both[0] - plain[0], 0.5)
    np.testing.assert_allclose(both[1] - plain[1], -0.5)


def test_without_a_step_scorer_process_grpo_is_grpo():
    settings = {"num_generations": 4, "beta": 0.0}
    assert points("process_grpo", **settings) == points("grpo", **settings)


def test_a_step_scorer_changes_spans_advantage_and_metrics():
    left = dict(_described("process_grpo", **PRM))
    right = dict(_described("process_grpo", **{**PRM, "step_scorer": None}))
    assert differing_points(left, right) == {"spans", "advantage", "metrics", "rewards"}


def _described(name, **settings):
    from grpo.describe import described

    return described(*halves(name, outcomes={"answer": 1.0, "steps": 1.0}, **settings))


def test_iterations_make_the_policy_the_reference():
    _, objective = halves("process_grpo", reference_every=3)
    assert objective.reference_update == ReferenceUpdate(every=3, decay=0.0)
    with pytest.raises(ValidationError, match="nothing reads the reference"):
        halves("process_grpo", reference_every=3, beta=0)


def test_a_reward_for_length_without_a_part_in_the_advantage_is_refused():
    with pytest.raises(ValidationError, match="set outcome_coef above 0"):
        halves("process_grpo", length_reward="kimi", step_scorer="steps")
    halves("process_grpo", length_reward="kimi")


def test_the_rows_of_process_grpo_have_the_advantages_of_their_steps():
    pipeline, _ = halves("process_grpo", outcomes=TWO, **PRM)
    rows = rows_of(pipeline, [two_answers()])
    np.testing.assert_allclose(
        rows[1].advantages,
        [-0.644658, -0.966988, -0.966988, -1.289317, -1.289317, 0],
        atol=1e-6,
    )


def test_step_scores_are_asked_for_once_and_where_steps_end():
    settings = {**PRM, "min_step_chars": 1}
    pipeline, _ = halves("process_grpo", outcomes=TWO, **settings)
    group = scored([a_text_rollout(0, "1+1=2\n2+2=4"), a_text_rollout(1, "no")], answer=[1.0, 0.0])
    spans = pipeline.spans(replace(group, scores=()), ("answer", "steps"))
    assert spans["steps"] == (
        Span(rollout=0, start=0, end=6),
        Span(rollout=0, start=6, end=12),
        Span(rollout=1, start=0, end=3),
    )
    assert spans["answer"] == (
        Span(rollout=0, start=0, end=12),
        Span(rollout=1, start=0, end=3),
    )
    judged = with_steps(group, (0, 0, 6, 1.0), (0, 6, 12, 1.0), (1, 0, 3, None))
    assert not any(pipeline.spans(judged, ("answer", "steps")).values())


def test_tokens_are_judged_one_by_one_for_prime():
    spans = process_spans.process_spans(rollout(0, 3), 2, unit="tokens", min_chars=20)
    assert spans == tuple(Span(rollout=2, start=t, end=t + 1) for t in range(3))


def a_prime_group(*, number: int = 0) -> Group:
    """q = (0.2, -0.1, 0.4) and (-0.3, 0, 0.1), outcomes 1 and 0."""
    q = [[0.2, -0.1, 0.4], [-0.3, 0.0, 0.1]]
    group = scored([rollout(0, 3), rollout(1, 3)], group=number, answer=[1.0, 0.0])
    return with_steps(
        group, *[(r, t, t + 1, value) for r, row in enumerate(q) for t, value in enumerate(row)]
    )


def prime(groups, *, normalize=True, process_coef=1.0):
    return process_advantage.two_sources(
        [rewarded(group) for group in groups],
        None,
        scorer="steps",
        process_coef=process_coef,
        normalize=normalize,
    )


def test_primes_advantages_are_those_worked_by_hand():
    ((first, second),) = prime([a_prime_group()])
    np.testing.assert_allclose(first, [0.971286, 0.679900, 0.971286], atol=1e-5)
    np.testing.assert_allclose(second, [-1.359800, -0.679900, -0.582772], atol=1e-5)


def test_primes_parts_are_those_worked_by_hand():
    q = [np.array([0.4, -0.2, 0.8]), np.array([-0.6, 0, 0.2])]
    present = [np.ones(3, bool)] * 2
    parts = process_advantage.leave_one_out_process(q, present)
    np.testing.assert_allclose(parts, [[0.6, -0.6, 1.4], [-1.4, -0.2, 0.2]])
    outcome = process_advantage.leave_one_out_outcomes(np.array([1.0, 0.0]))
    np.testing.assert_array_equal(outcome, [1, -1])
    returns = [
        process_advantage.returns_to_go(row) + value
        for row, value in zip(parts, outcome, strict=True)
    ]
    np.testing.assert_allclose(returns, [[2.4, 1.8, 2.4], [-2.4, -1, -0.8]])


def test_the_largest_return_is_that_of_the_whole_step():
    alone = prime([a_prime_group()])
    doubled = replace(
        a_prime_group(number=1),
        scores=tuple(
            replace(s, value=None if s.value is None else 2 * s.value)
            for s in a_prime_group(number=1).scores
        ),
    )
    together = prime([a_prime_group(), doubled])
    assert not np.allclose(together[0][0], alone[0][0])


def test_prime_without_process_rewards_is_whitened_outcomes():
    groups = random_groups(3, num_groups=3, num_generations=4)
    whitened = halves("reinforce_pp_baseline", num_generations=4)[0]
    plain = whitened.advantage([rewarded(group) for group in groups], None)
    for mine, theirs in zip(prime(groups), plain, strict=True):
        for row, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(row, other, atol=1e-9)


def test_prime_without_a_process_scorer_and_filter_is_reinforce_pp_with_baseline():
    settings = {"accuracy_low": 0.0, "accuracy_high": 1.0, "num_generations": 8}
    assert points("prime", **settings) == points("reinforce_pp_baseline")


def test_equal_sources_teach_exactly_nothing():
    group = scored([rollout(0, 3), rollout(1, 3)], answer=[1.0, 1.0])
    same = with_steps(group, *[(r, t, t + 1, 0.5) for r in range(2) for t in range(3)])
    ((first, second),) = prime([group])
    assert not first.any()
    assert not second.any()
    assert np.isfinite(np.concatenate(prime([same])[0])).all()


def test_an_answer_without_an_outcome_or_alone_has_a_finite_advantage():
    group = a_prime_group()
    unjudged = replace(
        group,
        scores=tuple(
            replace(s, value=None) if s.scorer == "answer" and s.span.rollout == 1 else s
            for s in group.scores
        ),
    )
    ((first, second),) = prime([unjudged])
    assert np.isfinite(first).all()
    assert not second.any()
    alone = scored([rollout(0, 3)], answer=[1.0])
    assert not prime([with_steps(alone, (0, 0, 1, 0.3))])[0][0].any()


@pytest.mark.parametrize(
    ("mean", "stays"), [(0.0, False), (0.25, True), (0.5, True), (0.75, True), (1.0, False)]
)
def test_prime_keeps_prompts_of_middling_accuracy(mean, stays):
    outcomes = [1.0] * round(4 * mean) + [0.0] * round(4 * (1 - mean))
    group = scored([rollout(i, 2) for i in range(4)], answer=outcomes)
    found = selection.drop_unless_accuracy_within(group, None, scorer="answer", low=0.2, high=0.8)
    assert (found is group) is stays
    if not stays:
        assert isinstance(found, Dropped)
        assert found.reason == "accuracy_out_of_range"
    at_bounds = selection.drop_unless_accuracy_within(
        group, None, scorer="answer", low=mean, high=mean
    )
    assert at_bounds is group  # the bounds belong to the range


def test_prime_refuses_to_drop_everything():
    with pytest.raises(ValidationError, match="every group would be dropped"):
        halves("prime", accuracy_low=0.9, accuracy_high=0.1)


@pytest.mark.parametrize("unit", ["tokens", "steps"])
def test_a_group_of_prime_by_the_real_group_task_is_judged_token_by_token(unit):
    settings = {
        "process_scorer": "prm",
        "process_unit": unit,
        "accuracy_low": 0,
        "min_step_chars": 1,
    }
    pipeline, _ = halves("prime", outcomes={"answer": 1.0, "prm": 0.5}, accuracy_high=1, **settings)
    group = grown(
        pipeline,
        answer=lambda item, span: float(item.tokens[0] % 2),
        prm=lambda item, span: float(item.tokens[span.start : span.end].mean() % 7),
    )
    spans = [s.span for s in group.scores if s.scorer == "prm"]
    assert len(set(spans)) == len(spans)
    covered = sum(span.end - span.start for span in spans)
    assert covered == sum(item.num_tokens for item in group.rollouts)
    rows = rows_of(pipeline, [group])
    assert all(len(set(row.advantages.tolist())) > 1 for row in rows if len(row.tokens) > 8)
    flat = np.concatenate([row.advantages for row in rows])
    assert abs(flat.mean()) < 1e-5
    assert flat.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert not any("prm" in text for text in points_of(pipeline))


def points_of(pipeline):
    from grpo.describe import call_text

    return [call_text(term) for term in pipeline.rewards]


def test_the_metrics_say_whether_the_process_scorer_likes_right_answers():
    group = with_steps(
        scored([rollout(i, 2) for i in range(4)], answer=[1.0, 1.0, 0.0, 0.0]),
        *[(i, 0, 2, value) for i, value in enumerate([0.1, 0.2, 0.8, 0.9])],
    )
    found = process_advantage.process_metrics([rewarded(group)], None, scorer="steps")
    assert found["process/outcome_correlation"] < -0.9
    assert found["process/mean_score"] == pytest.approx(0.5)
    assert found["process/mean_spans"] == 1
    bare = process_advantage.process_metrics(
        [rewarded(scored([rollout(0, 2)], answer=[1.0]))], None, scorer="steps"
    )
    assert bare == {"process/mean_spans": 0, "process/frac_unjudged": 1}


def test_equal_outcomes_are_worth_exactly_nothing_and_missing_ones_stay_missing():
    found = process_advantage.leave_one_out_outcomes(np.array([0.3, np.nan, 0.3]))
    np.testing.assert_array_equal(found, [0, np.nan, 0])
    # 1, 0, 1/2 of three judged: 3/2 r - 3/4
    found = process_advantage.leave_one_out_outcomes(np.array([1.0, 0.0, np.nan, 0.5]))
    np.testing.assert_allclose(found, [0.75, -0.75, np.nan, 0.0])


def test_answers_without_steps_or_without_an_outcome_are_in_no_correlation():
    group = with_steps(
        scored([rollout(i, 4) for i in range(5)], answer=[1.0, 0.0, None, 1.0, 0.0]),
        (0, 0, 2, 0.4),
        (0, 2, 4, 0.5),
        (1, 0, 4, 0.1),
        (2, 0, 4, 0.5),
        (3, 0, 4, None),
        (4, 0, 4, 0.5),
    )
    found = process_advantage.process_metrics([rewarded(group)], None, scorer="steps")
    assert found == {
        "process/mean_spans": 1.0,
        "process/frac_unjudged": pytest.approx(1 / 5),
        "process/mean_score": pytest.approx(0.4),
        # sums 0.9, 0.1, 0.5 and outcomes 1, 0, 0: 0.4 / sqrt(0.32 * 2 / 3)
        "process/outcome_correlation": pytest.approx(0.866025, abs=1e-6),
    }
