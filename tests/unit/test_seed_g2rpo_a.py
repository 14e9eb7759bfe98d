"""G2RPO-A: how long guidance is, who gets it, what of it is trained, the published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.algorithms import g2rpo_a, grpo
from grpo.batch import build_batch
from grpo.guidance import GuidanceState, leading_tokens, num_guided
from grpo.types import StepReport
from orchestration.checkpoint import decoded_state, encoded_state
from tests.unit.grpo_groups import random_groups, rollout, scored
from tests.unit.seed_groups import streams, token_group, with_prompt

REPORT = StepReport(metrics={}, timings_s={})
FAST = {"max_guidance_length": 3072}


def built(*, length=4096, outcomes=None, **settings):
    config = g2rpo_a.Config(**settings)
    return g2rpo_a.pipeline(
        config, outcomes=outcomes or {"answer": 1.0}, max_completion_length=length
    )


def rewarded(mean):
    """A group with this mean outcome."""
    group = scored([rollout(0, 2), rollout(1, 2)], answer=[mean, mean])
    pipeline = grpo.pipeline(grpo.Config(), outcomes={"answer": 1.0}, max_completion_length=9)
    return build_batch(pipeline, [group], None, step=1, version=0, num_updates=1).rewarded


def lengths(pipeline, means):
    """The guidance length after each step with these mean outcomes."""
    state, found = pipeline.initial_state, []
    for mean in means:
        state = pipeline.adapt(state, rewarded(mean), REPORT)
        assert decoded_state(pipeline.initial_state, encoded_state(state)) == state
        found.append(state.length)
    return found


def test_the_released_cycle_moves_the_length_every_third_step():
    # Step 6: 3072 * 0.4 / 0.5 = 2457.6, cut. Step 9: 2457 * 0.5 / 0.25 = 4914, above the maximum.
    means = [0.2, 0.3, 0.2, 0.4, 0.4, 0.5, 0.5, 0.5, 0.25]
    assert lengths(built(), means) == [3072] * 5 + [2457] * 3 + [3072]


@pytest.mark.parametrize(
    ("means", "last"),
    [
        ([0.1, 0.2, 0.3], 500),  # 1000 * 0.15 / 0.3
        ([0.3, 0.3, 0.2], 1499),  # 1000 * (0.3 / 0.2) is 1499.9999999999998, and cut
        ([0.0, 0.0, 0.5], 1000),
        ([0.5, 0.5, 0.0], 1000),
    ],
)
def test_the_released_cycle_on_worked_cases(means, last):
    found = lengths(built(initial_guidance_length=1000), means)
    assert found == [1000, 1000, last]


def test_guidance_never_gets_shorter_than_a_token():
    assert lengths(built(initial_guidance_length=2), [0.1, 0.1, 0.9])[-1] == 1


def test_a_step_without_a_right_answer_can_make_guidance_longer():
    pipeline = built(initial_guidance_length=1000, on_zero="grow")
    assert lengths(pipeline, [0.5, 0.5, 0.0])[-1] == 1500
    assert lengths(pipeline, [0.0, 0.0, 0.5])[-1] == 1000
    sliding = built(initial_guidance_length=1000, on_zero="grow", length_rule="sliding")
    assert lengths(sliding, [0.0, 0.0])[-1] == 2250


def test_the_sliding_rule_on_worked_cases():
    means = [0.2, 0.25, 0.25, 0.5, 0.4, 0.4]
    two = built(length_rule="sliding", initial_guidance_length=1000)
    three = built(length_rule="sliding", initial_guidance_length=1000, history=3)
    assert lengths(two, means) == pytest.approx([1000, 800, 720, 360, 337.5, 379.6875])
    assert lengths(three, means) == pytest.approx([1000, 800, 720, 336, 280, 268.3333])


def test_guidance_grows_when_answers_get_worse_unless_the_formula_is_taken_as_quoted():
    worse = [0.4, 0.4, 0.2]
    assert lengths(built(initial_guidance_length=1000), worse)[-1] == 2000
    quoted = built(initial_guidance_length=1000, length_ratio="current_over_average")
    assert lengths(quoted, worse)[-1] == 500


def test_the_decay_baseline_on_the_worked_case():
    pipeline = built(length_rule="linear_decay", decay_steps=7)
    expected = [3072, 2560, 2048, 1536, 1024, 512, 0]
    assert [pipeline.initial_state.length, *lengths(pipeline, [0.5] * 6)] == expected
    assert lengths(pipeline, [0.5] * 9)[-1] == 0
    assert lengths(built(length_rule="fixed"), [0.1, 0.9, 0.2]) == [3072] * 3


def test_a_step_that_nothing_judged_changes_nothing():
    for rule in ("cycle3", "sliding"):
        pipeline = built(length_rule=rule)
        state = pipeline.adapt(pipeline.initial_state, rewarded(0.5), REPORT)
        assert (state.recent, state.num_steps) == ((0.5,), 1)
        assert pipeline.adapt(state, rewarded(None), REPORT) == state


def test_the_outcome_that_moves_the_length_is_raw_and_of_the_chosen_scorer():
    outcomes = {"style": 0.1, "answer": 5.0}
    group = scored([rollout(0, 2), rollout(1, 2)], answer=[0.5, 0.5], style=[1.0, 1.0], group=0)

    def after(**settings):
        pipeline = built(length_rule="sliding", outcomes=outcomes, **settings)
        batch = build_batch(
            pipeline, [group], pipeline.initial_state, step=1, version=0, num_updates=1
        )
        return pipeline.adapt(pipeline.initial_state, batch.rewarded, REPORT).recent

    assert after() == (0.5,)  # the largest weight
    assert after(progress_scorer="style") == (1.0,)
    with pytest.raises(ValueError, match=r"progress_scorer is 'anwser'.*found: style, answer"):
        built(outcomes=outcomes, progress_scorer="anwser")


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [
        (1 / 6, 12, 2),
        (1 / 4, 10, 2),
        (1 / 4, 12, 3),
        (3 / 4, 10, 7),
        (3 / 4, 12, 9),
        (1, 10, 10),
        (0.29, 100, 29),  # 28.999999999999996 in floats
        (0.1, 4, 1),
        (0, 4, 0),
    ],
)
def test_the_number_of_guided_rollouts_is_rounded_down_to_at_least_one(fraction, size, count):
    assert num_guided(fraction, size) == count


def plans_for(solution, *, state=None, prompt_solution=True, **settings):
    pipeline = built(**settings)
    group = scored([])
    if prompt_solution:
        group = with_prompt(group, solution_tokens=np.array(solution, np.int32))
    return pipeline.plan(group, state or pipeline.initial_state)


def test_the_first_rollouts_of_a_group_continue_the_solution_and_the_rest_start_afresh():
    found = plans_for(range(10, 30), state=GuidanceState(length=3), num_generations=12)
    assert [plan.guidance.tolist() for plan in found] == [[10, 11, 12]] * 2 + [[]] * 10
    assert all(plan.text is None for plan in found)


def test_a_prompt_without_a_solution_is_not_guided():
    assert all(len(plan.guidance) == 0 for plan in plans_for((), prompt_solution=False))
    assert len(plans_for(())) == 12


def test_a_group_is_planned_once():
    pipeline = built()
    group = token_group([[1], [2]], [1.0, 0.0])
    assert pipeline.plan(group, pipeline.initial_state) == ()


@pytest.mark.parametrize(
    ("length", "share", "ends", "most", "expected"),
    [
        (4, 0.9, (), 99, 4),
        (50, 0.9, (), 99, 9),  # floor(0.9 * 10)
        (50, 0.5, (), 99, 5),
        (50, 0.9, (7,), 99, 6),  # token 7 is the 8th: floor(0.9 * 7)
        (50, 0.9, (0,), 99, 0),
        (50, 0.9, (), 5, 5),  # the completion budget
        (2.5, 0.9, (), 99, 2),
        (379.6875, 0.9, (), 99, 9),
        (50, 0.9, (), 0, 0),
    ],
)
def test_guidance_never_gives_the_answer_away(length, share, ends, most, expected):
    solution = np.arange(10, dtype=np.int32)
    found = leading_tokens(solution, length=length, share=share, end_tokens=ends, max_tokens=most)
    assert found.tolist() == list(range(expected))


def test_a_guided_rollout_always_has_a_token_left_to_write():
    found = plans_for(range(100), length=8)
    assert {len(plan.guidance) for plan in found} == {7, 0}


# Rewards 1, 1, 0, 0; 3, 0, 3, 0 given tokens before 2, 4, 5, 3 sampled ones.
GUIDED = [[1] * 5, [2] * 4, [3] * 8, [4] * 3]


def guided_group():
    return token_group(GUIDED, [1.0, 1.0, 0.0, 0.0], guidance=[3, 0, 3, 0])


def per_token(**settings):
    """The coefficient of each row's trained tokens."""
    _, _, terms = streams(built(**settings), guided_group(), GuidanceState(length=3))
    return [float(term[term != 0][0]) for term in terms]


def test_worked_coefficients_with_and_without_the_given_tokens_in_the_loss():
    # a = 0.5 / (0.57735 + 1e-4) = 0.865875; over 4 rows and 5, 4, 8, 3 or 2, 4, 5, 3 tokens.
    assert per_token() == pytest.approx([0.043294, 0.054117, -0.027059, -0.072156], abs=1e-6)
    assert per_token(guidance_in_loss=False) == pytest.approx(
        [0.108234, 0.054117, -0.043294, -0.072156], abs=1e-6
    )
    mean = {"aggregation": "token_mean"}
    assert np.abs(per_token(**mean)) == pytest.approx([0.043294] * 4, abs=1e-6)
    assert np.abs(per_token(**mean, guidance_in_loss=False)) == pytest.approx(
        [0.061848] * 4, abs=1e-6
    )


def test_worked_share_of_the_loss_that_falls_on_given_tokens():
    def share(**settings):
        _, _, terms = streams(built(**settings), guided_group(), GuidanceState(length=3))
        given = sum(np.abs(terms[place][:3]).sum() for place in (0, 2))
        return given / sum(np.abs(term).sum() for term in terms)

    assert share() == pytest.approx(0.2438, abs=5e-5)
    assert share(guidance_in_loss=False) == 0


def test_metrics_tell_guided_from_unguided_answers():
    pipeline, state = built(), GuidanceState(length=7.5)
    separating = token_group([[1] * 4, [2]], [1.0, 0.0], guidance=[2, 0])
    hopeless = token_group([[1], [2]], [0.0, 0.0])  # nobody was guided
    groups = [guided_group(), separating, hopeless]
    batch = build_batch(pipeline, groups, state, step=1, version=0, num_updates=1)
    found = {name: value for name, value in batch.metrics.items() if name.startswith("guidance/")}
    assert found == {
        "guidance/length": 7.5,
        "guidance/tokens": pytest.approx(8 / 3),
        "guidance/frac_guided": pytest.approx(3 / 8),
        "guidance/outcome_guided": pytest.approx(2 / 3),
        "guidance/outcome_unguided": pytest.approx(1 / 5),
        "guidance/frac_separating": pytest.approx(1 / 3),
    }


def test_without_guided_rollouts_it_is_grpo_to_the_last_bit():
    groups = random_groups(5, num_groups=4, num_generations=12)
    ours = built(guided_fraction=0)
    theirs = grpo.pipeline(
        grpo.Config(num_generations=12), outcomes={"answer": 1.0}, max_completion_length=9
    )
    empty = scored([])
    assert [len(p.guidance) for p in ours.plan(empty, ours.initial_state)] == [0] * 12
    updates = [
        build_batch(p, groups, p.initial_state, step=0, version=0, num_updates=2).batch.updates
        for p in (ours, theirs)
    ]
    for mine, others in zip(*updates, strict=True):
        for row, other in zip(mine, others, strict=True):
            np.testing.assert_array_equal(row.weights, other.weights)
            np.testing.assert_array_equal(row.advantages, other.advantages)


def test_equal_outcomes_teach_nothing_even_to_given_tokens():
    group = token_group(GUIDED, [1.0] * 4, guidance=[3, 0, 3, 0])
    _, weights, terms = streams(built(), group, GuidanceState(length=3))
    assert all((term == 0).all() for term in terms)
    assert all(np.isfinite(weight).all() for weight in weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_guidance_length": 9, "max_guidance_length": 8}, "lower the one"),
        ({"length_rule": "linear_decay"}, "needs decay_steps"),
        ({"decay_steps": 9}, "no other rule takes it"),
        ({"guided_fraction": 1.1}, "less than or equal to 1"),
        ({"max_solution_share": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        g2rpo_a.Config(**settings)


def test_a_group_in_which_all_are_guided_separates_nothing():
    pipeline, state = built(), GuidanceState(length=1)
    guided = token_group([[1] * 4, [2] * 2], [1.0, 1.0], guidance=[1, 1])
    found = build_batch(pipeline, [guided], state, step=1, version=0, num_updates=1).metrics
    assert {name: value for name, value in found.items() if name.startswith("guidance/")} == {
        "guidance/length": 1,
        "guidance/tokens": 1,
        "guidance/frac_guided": 1,
        "guidance/outcome_guided": 1,
        "guidance/frac_separating": 0,
    }
