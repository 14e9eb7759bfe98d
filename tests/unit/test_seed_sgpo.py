"""SGPO: what is judged, from right steps to rewards, the published numbers, the two-step toy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from grpo import first_errors
from grpo.advantage import standardized_values
from grpo.algorithms import grpo, sgpo
from grpo.batch import build_batch
from grpo.types import Score, Span
from tests.unit.grpo_groups import random_groups, scored
from tests.unit.seed_groups import a_rollout, a_text_rollout, streams

BOTH = {"answer": 1.0, "steps": 1.0}


def built(outcomes=None, **settings):
    config = sgpo.Config(**{"step_scorer": "steps", "min_step_chars": 1, **settings})
    return sgpo.pipeline(config, outcomes=outcomes or BOTH, max_completion_length=96)


def judged_group(rows, correct=None, *, sizes=None, truncated=()):
    """One list of step values per answer (or None: not asked); steps of 2 tokens by default."""
    widths = sizes or [[2] * len(row or [None]) for row in rows]
    rollouts = [
        a_rollout(i, range(sum(width)), truncated=i in truncated) for i, width in enumerate(widths)
    ]
    group = scored(rollouts, answer=[0.0] * len(rows) if correct is None else correct)
    steps = []
    for place, (row, width) in enumerate(zip(rows, widths, strict=True)):
        starts = np.cumsum([0, *width]).tolist()
        steps += [
            Score(scorer="steps", span=Span(rollout=place, start=a, end=b), value=value)
            for (a, b), value in zip(itertools.pairwise(starts), row or [], strict=False)
        ]
    return replace(group, scores=(*group.scores, *steps))


def first_wrong(k, n):
    """n steps, the k-th the first wrong one; what follows may be right again."""
    return [1.0] * (k - 1) + [0.0] + [1.0] * (n - k)


C1 = [first_wrong(1, 5), first_wrong(3, 4), first_wrong(4, 6), first_wrong(8, 8)]
RTS = [0, 0.5, 0.5, 0.875]


def rewards(group, **settings):
    pipeline = built(**settings)
    batch = build_batch(pipeline, [group], None, step=0, version=0, num_updates=1)
    return batch.rewarded[0].rewards


def advantages(group, **settings):
    return [value[0] for value in streams(built(**settings), group)[0]]


def test_worked_rewards_and_advantages_of_a_group_without_a_right_answer():
    group = judged_group(C1)
    np.testing.assert_allclose(rewards(group), [0.075858, 0.5, 0.5, 0.867036], atol=1e-6)
    np.testing.assert_allclose(
        advantages(group, std_ddof=0, std_eps=0),
        [-1.463347, 0.050972, 0.050972, 1.361404],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        advantages(group), [-1.266904, 0.044129, 0.044129, 1.178646], atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shaping": "none"}, [-1.507557, 0.100504, 0.100504, 1.306549]),
        ({"slope": 0.01}, [-1.507556, 0.100503, 0.100503, 1.30655]),
        ({"slope": 20.0}, [-1.414572, 0.000359, 0.000359, 1.413854]),
    ],
)
def test_worked_advantages_of_other_shapes(settings, expected):
    found = advantages(judged_group(C1), std_ddof=0, std_eps=0, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def shape(share, shaping="logistic"):
    return first_errors.shaped(share, shaping=shaping, slope=5.0, threshold=0.5)


def test_more_right_reasoning_is_worth_more_except_as_transcribed():
    shares = np.linspace(0, 1, 11)
    for shaping in ("logistic", "none"):
        assert (np.diff([shape(x, shaping) for x in shares]) > 0).all()
    transcribed = rewards(judged_group(C1), shaping="logistic_as_transcribed")
    np.testing.assert_allclose(transcribed, [0.924142, 0.5, 0.5, 0.132964], atol=1e-6)
    assert (np.diff([shape(x, "logistic_as_transcribed") for x in shares]) < 0).all()


def test_a_wrong_answer_is_never_worth_a_right_one():
    assert (shape(0.0), shape(1.0)) == pytest.approx((0.075858, 0.924142), abs=1e-6)


def test_beside_a_right_answer_wrong_ones_are_judged_only_in_the_wider_scope():
    rows = [None, first_wrong(3, 4), first_wrong(4, 6), first_wrong(8, 8)]
    group = judged_group(rows, [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(rewards(group), [1, 0, 0, 0])
    np.testing.assert_allclose(
        rewards(group, scope="every_wrong"), [1, 0.5, 0.5, 0.867036], atol=1e-6
    )
    np.testing.assert_allclose(
        advantages(group, scope="every_wrong", std_ddof=0, std_eps=0),
        [1.277022, -0.977281, -0.977281, 0.677539],
        atol=1e-6,
    )


def test_equally_right_reasoning_teaches_nothing():
    found = advantages(judged_group([first_wrong(3, 5)] * 3), std_eps=0)
    assert found == [0, 0, 0]


@pytest.mark.parametrize(("p1", "p2"), [(0.2, 0.1), (0.5, 0.1)])
def test_worked_gradients_of_the_two_step_toy(p1, p2):
    """Two answers of two steps, right with p1 and p2; both have to be. Exact expectation."""
    answers = list(itertools.product((0, 1), repeat=2))

    def expected(judge):
        gradient, silent = np.zeros(2), 0.0
        for pair in itertools.product(answers, repeat=2):
            weight = np.prod([(p1 if a else 1 - p1) * (p2 if b else 1 - p2) for a, b in pair])
            rows = [[float(a), float(b)] for a, b in pair]
            group = judged_group(rows, [float(a and b) for a, b in pair])
            found = np.array(advantages(group, std_ddof=0, std_eps=0, step_scorer=judge))
            silent += weight * (not found.any())
            score = np.array([[a - p1, b - p2] for a, b in pair])  # gradients of the logits
            gradient += weight * (found[:, None] * score).mean(axis=0)
        return [*gradient, silent]

    worked = {
        (0.2, 0.1): ([0.016, 0.018, 0.9608], [0.16, 0.0036, 0.6728]),
        (0.5, 0.1): ([0.025, 0.045, 0.905], [0.25, 0.0225, 0.455]),
    }
    plain, stepwise = worked[p1, p2]
    assert expected(None) == pytest.approx(plain, abs=1e-9)
    assert expected("steps") == pytest.approx(stepwise, abs=1e-9)


def share(row, **settings):
    """The right share of the first of two wrong answers; the other is wrong from the start."""
    group = judged_group([row, [0.0]], **settings.pop("group", {}))
    return rewards(group, shaping="none", **settings)[0]


def test_if_no_step_is_wrong_the_last_one_has_to_be():
    assert share([1.0, 1.0, 1.0, 1.0]) == 3 / 4
    assert share([1.0]) == 0


def test_steps_that_the_judge_cannot_judge_are_no_steps():
    assert share([1.0, None, 0.0, 1.0]) == 1 / 3
    assert share([None, None]) == 0


def test_the_share_can_count_tokens():
    group = {"sizes": [[1, 5, 2, 2], [3]]}
    assert share([1.0, 1.0, 0.0, 1.0], group=group, unit="tokens") == 6 / 10
    assert share([1.0, 1.0, 0.0, 1.0], group=group, unit="steps") == 2 / 4


def test_a_cut_off_answer_can_be_held_to_the_median_length():
    rows = [[1.0, 0.0], [1.0, 0.0], first_wrong(2, 4), first_wrong(2, 6), first_wrong(2, 6)]
    group = judged_group(rows, truncated=(0, 3))  # the median of 2, 2, 4, 6, 6 is 4
    plain = rewards(group, shaping="none")
    np.testing.assert_allclose(plain, [1 / 2, 1 / 2, 1 / 4, 1 / 6, 1 / 6])
    held = rewards(group, shaping="none", truncated_length="median")
    np.testing.assert_allclose(held, [1 / 4, 1 / 2, 1 / 4, 1 / 6, 1 / 6])


def test_a_group_that_is_mostly_unjudged_keeps_its_outcomes():
    half = judged_group([[None], [None], first_wrong(2, 4), first_wrong(1, 4)])
    most = judged_group([[None], [None], [None], first_wrong(2, 4)])
    np.testing.assert_allclose(rewards(half, shaping="none"), [0, 0, 0.25, 0])
    np.testing.assert_array_equal(rewards(most), [0, 0, 0, 0])
    assert advantages(most) == [0, 0, 0, 0]
    np.testing.assert_allclose(rewards(most, shaping="none", max_unjudged=1.0), [0, 0, 0, 0.25])


def test_advantages_without_a_right_answer_can_be_scaled():
    wrong = judged_group(C1)
    np.testing.assert_allclose(
        advantages(wrong, all_wrong_scale=0.5), 0.5 * np.array(advantages(wrong))
    )
    mixed = judged_group([None, first_wrong(1, 2)], [1.0, 0.0])
    assert advantages(mixed, all_wrong_scale=0.5) == advantages(mixed)


def test_only_wrong_answers_of_hopeless_groups_are_sent_to_the_judge_after_the_outcomes():
    pipeline = built()
    rollouts = [a_text_rollout(i, text) for i, text in enumerate(["1+1=3\n3+1=4", "1+1=2", ""])]
    fresh = replace(scored(rollouts), scores=())
    first = pipeline.spans(fresh, ("answer", "style", "steps"))
    assert sorted(first) == ["answer", "style"]
    assert [(s.rollout, s.start, s.end) for s in first["answer"]] == [
        (0, 0, 12),
        (1, 0, 6),
        (2, 0, 1),
    ]
    hopeless = scored(rollouts, answer=[0.0, 0.0, 0.0])
    second = pipeline.spans(hopeless, ("answer", "style", "steps"))
    assert [(s.rollout, s.start, s.end) for s in second["steps"]] == [
        (0, 0, 6),
        (0, 6, 12),
        (1, 0, 6),
    ]
    done = replace(
        hopeless,
        scores=(
            *hopeless.scores,
            *(Score(scorer="steps", span=span, value=0.0) for span in second["steps"]),
        ),
    )
    assert not any(pipeline.spans(done, ("answer", "steps")).values())
    mixed = scored(rollouts, answer=[1.0, 0.0, None])
    assert not any(pipeline.spans(mixed, ("answer", "steps")).values())
    wider = built(scope="every_wrong").spans(mixed, ("answer", "steps"))
    assert [s.rollout for s in wider["steps"]] == [1]
    nothing_said = scored([rollouts[2]], answer=[0.0])
    assert not any(pipeline.spans(nothing_said, ("answer", "steps")).values())


def test_an_answer_that_was_not_judged_is_neither_right_nor_wrong():
    group = judged_group([first_wrong(2, 2), None, first_wrong(1, 2)], [0.0, None, 0.0])
    found = rewards(group)
    assert np.isnan(found[1]) and found[0] > found[2] > 0
    assert advantages(group)[1] == 0


def test_the_step_scorer_is_no_outcome_and_other_scorers_stay():
    pipeline = built({"style": 0.5, "answer": 2.0, "steps": 9.0})
    group = judged_group([first_wrong(2, 4), first_wrong(1, 4)])
    whole = [Score(scorer="style", span=s.span, value=1.0) for s in group.scores[:2]]
    group = replace(group, scores=(*group.scores, *whole))
    batch = build_batch(pipeline, [group], None, step=0, version=0, num_updates=1)
    expected = 2 * np.array([shape(0.25), shape(0.0)]) + 0.5
    np.testing.assert_allclose(batch.rewarded[0].rewards, expected)
    assert batch.metrics["rewards/answer/mean"] == 0
    assert batch.metrics["rewards/stepwise_outcome/mean"] == pytest.approx((expected - 0.5).mean())


@pytest.mark.parametrize(
    ("outcomes", "settings", "message"),
    [
        ({"answer": 1.0}, {"step_scorer": "judge"}, r"step_scorer is 'judge'.*found: answer"),
        (BOTH, {"outcome_scorer": "steps"}, r"outcome_scorer is 'steps'.*found: answer"),
        ({"steps": 1.0}, {}, "no scorer has a weight"),
        ({"answer": 1.0, "style": 0.0, "steps": 1.0}, {"outcome_scorer": "style"}, "weight is 0"),
    ],
)
def test_scorers_that_cannot_do_their_part_are_refused(outcomes, settings, message):
    with pytest.raises(ValueError, match=message):
        built(outcomes, **settings)


def test_settings_that_cannot_be_meant_are_refused():
    for settings in ({"slope": -5.0}, {"scope": "all_negative"}, {"all_wrong_scale": 0}):
        with pytest.raises(ValidationError):
            sgpo.Config(**settings)


def assert_equal_rows(ours, theirs, groups):
    updates = [
        build_batch(p, groups, None, step=0, version=0, num_updates=2).batch.updates
        for p in (ours, theirs)
    ]
    for mine, others in zip(*updates, strict=True):
        for row, other in zip(mine, others, strict=True):
            np.testing.assert_array_equal(row.weights, other.weights)
            np.testing.assert_array_equal(row.advantages, other.advantages)


def test_without_a_judge_or_without_a_hopeless_group_it_is_grpo_to_the_last_bit():
    groups = random_groups(6, num_groups=4, num_generations=8)
    theirs = grpo.pipeline(grpo.Config(), outcomes={"answer": 1.0}, max_completion_length=96)
    assert_equal_rows(built({"answer": 1.0}, step_scorer=None), theirs, groups)
    assert_equal_rows(built(), theirs, groups)


def test_metrics_say_how_often_the_judge_was_needed_and_what_it_said():
    groups = [
        judged_group(C1),
        judged_group([[1.0, 1.0], [None], [], first_wrong(1, 3)]),
        judged_group([first_wrong(1, 2)] * 4),
        judged_group([None] * 4, [1.0, 0.0, 0.0, 0.0]),
    ]
    batch = build_batch(built(), groups, None, step=0, version=0, num_updates=1)
    found = {name: value for name, value in batch.metrics.items() if name.startswith("judge/")}
    assert found == {
        "judge/num_rollouts": 12,
        "judge/frac_all_wrong": 0.75,
        "judge/frac_all_wrong_constant": pytest.approx(1 / 3),
        "judge/frac_no_wrong_step": pytest.approx(1 / 10),
        "judge/frac_unjudged": pytest.approx(1 / 12),
        "judge/right_share": pytest.approx((sum(RTS) + 0.5) / 10),
    }


def test_any_shift_of_the_threshold_without_curvature_leaves_the_advantages():
    # In a hopeless group only the spread counts: raw shares and an affine map of them agree.
    raw = standardized_values(np.array(RTS), ddof=1, eps=0)
    moved = standardized_values(0.3 + 0.1 * np.array(RTS), ddof=1, eps=0)
    np.testing.assert_allclose(raw, moved)
