"""Tree search over steps, pairs of steps and of answers, and DPO on them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from grpo import answer_quality, dpo, history, pairs, search
from grpo.batch import workings
from grpo.objective import RowScore, loss_and_metrics
from grpo.pipeline import RewardedGroup
from grpo.types import Group, Prompt
from tests.unit.family_cases import halves, points
from tests.unit.grpo_groups import flat, loss_inputs, rollout, scored
from tests.unit.seed_groups import a_rollout
from tests.unit.tree_groups import TreeEngine, grown, pieced

SMALL = {
    "num_generations": 2,
    "max_step_tokens": 4,
    "num_iterations": 6,
    "root_factor": 2,
}


def row_score(label: float, log_ratio: float) -> RowScore:
    return RowScore(
        advantage=label, log_prob_sum=0.0, log_ratio_sum=log_ratio, ratio_mean=1.0, num_trained=1
    )


def smoothed_loss(h: float, *, beta: float, doubt: float) -> float:
    """DPO's loss, smoothed, written down directly."""
    return (1 - doubt) * math.log1p(math.exp(-beta * h)) + doubt * math.log1p(math.exp(beta * h))


@pytest.mark.parametrize(
    ("h", "doubt", "loss"), [(5.0, 0.0, 0.474077), (0.0, 0.0, 0.693147), (1.6, 0.25, 0.656344)]
)
def test_the_advantages_of_a_pair_are_the_gradient_of_its_loss(h, doubt, loss):
    assert smoothed_loss(h, beta=0.1, doubt=doubt) == pytest.approx(loss, abs=1e-6)
    rows = [row_score(1 - doubt, h + 2.0), row_score(doubt - 1, 2.0)]
    better, worse = dpo.preference_advantages(rows, beta=0.1)
    step = 1e-6
    slope = (
        smoothed_loss(h + step, beta=0.1, doubt=doubt)
        - smoothed_loss(h - step, beta=0.1, doubt=doubt)
    ) / (2 * step)
    assert -better == pytest.approx(slope, abs=1e-7)
    assert worse == -better


def test_the_gradient_of_the_published_pairs_is_the_one_worked_by_hand():
    better, _ = dpo.preference_advantages([row_score(1, 2.0), row_score(-1, -3.0)], beta=0.1)
    assert better == pytest.approx(0.03775406687981454)
    assert dpo.preference_advantages([row_score(1, 0.0), row_score(-1, 0.0)], beta=0.1) == [
        0.05,
        -0.05,
    ]


def test_a_pair_that_may_as_well_be_the_other_way_round_does_not_move_at_the_start():
    assert dpo.preference_advantages([row_score(0.5, 0), row_score(-0.5, 0)], beta=0.1) == [0, 0]


def test_an_extreme_pair_is_finite_and_one_that_came_twice_counts_twice():
    far = [row_score(1, 1e6), row_score(-1, -1e6)]
    near = [row_score(1, -1e6), row_score(-1, 1e6)]
    found = dpo.preference_advantages([*far, *near], beta=1.0)
    assert found == [pytest.approx(0, abs=1e-12)] * 2 + [1.0, -1.0]
    with pytest.raises(ValueError, match="found 1"):
        dpo.preference_advantages(far[:1], beta=1.0)


@pytest.mark.parametrize(
    ("better", "worse", "doubt"), [(6, 2, 0.25), (1, 5, 0.5), (1, 1, 0.5), (0, 0, 0.0)]
)
def test_doubt_grows_with_the_visits_of_the_worse_step(better, worse, doubt):
    assert dpo.doubt_from_visits(better, worse) == doubt


def test_puct_prior_and_value_are_those_worked_by_hand():
    found = search.puct(quality=0.2, prior=0.5, parent_visits=9, visits=2, weight=1.0)
    assert found == pytest.approx(0.7)
    prior = search.step_prior(np.array([-0.1, -0.3, -0.2, -0.4]))
    assert prior == pytest.approx(0.837967, abs=1e-6)
    below = search.mean_by_visits([3, 1, 0], [0.6, -0.2, 0.1])
    assert below == pytest.approx(0.34)
    node = search.SearchNode(
        place=0,
        parent=search.SearchNode(
            place=None, parent=None, depth=0, prior=1.0, value=0.1, is_end=False
        ),
        depth=1,
        prior=1.0,
        value=0.4,
        is_end=False,
    )
    for visits, quality in ((3, 0.6), (1, -0.2), (0, 0.1)):
        child = search.SearchNode(place=1, parent=node, depth=2, prior=1.0, value=0.4, is_end=True)
        child.visits, child.quality = visits, quality
        node.children.append(child)
    search._back_up([node], 1.0)
    assert node.quality == pytest.approx(0.64)  # 0.3 for the step, 0.34 for what follows
    assert node.visits == 1


def mcts(**settings):
    return halves("mcts_dpo", length=24, **{**SMALL, **settings})


def settings_of(pipeline) -> search.SearchSettings:
    found: search.SearchSettings = pipeline.plan.keywords["settings"]
    return found


def searched(number: int = 0, **settings):
    pipeline, _ = mcts(**settings)
    engine = TreeEngine(ends=0.08)
    return pipeline, grown(pipeline, number=number, engine=engine), engine


@pytest.mark.parametrize("number", range(4))
def test_a_search_ends_with_a_whole_answer_and_scores_each_ended_one_once(number):
    pipeline, group, _ = searched(number)
    found = search.searched(group, settings_of(pipeline))
    assert found.wanted is None
    assert found.chosen[-1].is_end
    ended = [
        place
        for place, item in enumerate(group.rollouts)
        if item.num_tokens == 24 or not item.is_truncated
    ]
    assert sorted(score.span.rollout for score in group.scores) == ended
    for node in found.chosen[1:]:
        assert node.parent is not None
        assert node in node.parent.children
        assert node.quality == max(child.quality for child in node.parent.children)


def test_every_node_has_as_many_children_as_actions_or_none():
    _, group, engine = searched()
    keys = [tuple(p.id for p in item.lineage)[:-1] for item in group.rollouts]
    assert {keys.count(key) for key in keys} == {2}
    assert engine.waves == len(group.rollouts) // 2
    for item in group.rollouts:
        bounds = [0, *(piece.end for piece in item.lineage)]
        assert all(0 < b - a <= 4 for a, b in pairwise(bounds))


def test_the_search_finds_the_step_that_leads_to_right_answers():
    # An answer is right if its second token is a newline; both children of the root differ there.
    def is_right(item, span):
        return float(item.tokens[1] == 10)

    for number in range(8):
        pipeline, _ = mcts()
        engine = TreeEngine(ends=0.05, newline=0.5)
        group = grown(pipeline, number=number, engine=engine, answer=is_right)
        first = [item for item in group.rollouts if len(item.lineage) <= 1]
        if len({int(item.tokens[1] == 10) for item in first}) == 1:
            continue
        found = search.step_pairs(group, settings_of(pipeline))
        assert group.rollouts[found[0].better].tokens[1] == 10
        assert group.rollouts[found[0].worse].tokens[1] != 10
        return
    raise AssertionError("no group whose first steps differ")


def test_a_value_scorer_judges_each_node_once_and_is_no_reward():
    pipeline, _ = mcts_with_value()
    group = grown(
        pipeline,
        answer=lambda item, span: 1.0,
        value=lambda item, span: float(item.tokens[span.end - 1] % 5) / 5,
    )
    judged = [score.span.rollout for score in group.scores if score.scorer == "value"]
    assert sorted(judged) == list(range(len(group.rollouts)))
    values = search.node_values(group, settings_of(pipeline))
    first = next(i for i, item in enumerate(group.rollouts) if len(item.lineage) == 1)
    assert values[first] == pytest.approx(group.rollouts[first].tokens[-1] % 5 / 5)


def mcts_with_value():
    return halves(
        "mcts_dpo",
        length=24,
        outcomes={"answer": 1.0, "value": 1.0},
        value_scorer="value",
        **SMALL,
    )


def test_a_value_beyond_the_third_step_counts_less():
    settings = replace(settings_of(mcts_with_value()[0]), max_tokens=99)
    deep = [pieced(0, (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), pieced(1, (0, 1))]
    group = scored(deep, value=[0.8, 0.8])
    np.testing.assert_allclose(search.node_values(group, settings), [0.4, 0.8])


def test_the_rows_of_a_step_pair_train_the_step_alone():
    pipeline, group, _ = searched(2)
    (item,) = workings(pipeline, [group], None, num_updates=1).rewarded
    assert pipeline.stage is not None
    rows = pipeline.stage.collect(item, None)
    assert rows
    assert len(rows) == 2 * len(search.step_pairs(group, settings_of(pipeline)))
    for better, worse in zip(rows[::2], rows[1::2], strict=True):
        assert better.group == worse.group
        start = int(np.flatnonzero(better.weights)[0])
        assert np.flatnonzero(worse.weights)[0] == start
        np.testing.assert_array_equal(better.tokens[:start], worse.tokens[:start])
        assert set(better.weights[start:].tolist()) == {1 / 32}
        assert set(better.advantages.tolist()) == {-value for value in worse.advantages.tolist()}
        assert 0.5 <= better.advantages[0] <= 1
    assert len({row.group for row in rows}) == len(rows) // 2


def test_pairs_of_different_groups_never_have_the_same_number():
    numbers = []
    for number in range(3):
        pipeline, group, _ = searched(number)
        (item,) = workings(pipeline, [group], None, num_updates=1).rewarded
        assert pipeline.stage is not None
        numbers += sorted({row.group for row in pipeline.stage.collect(item, None)})
    assert len(set(numbers)) == len(numbers)


def test_steps_of_mcts_dpo_weigh_nothing_unless_asked_to():
    pipeline, group, _ = searched()
    found = workings(pipeline, [group], None, num_updates=1)
    assert not any(row.any() for rows in found.weights for row in rows)
    pipeline, _ = mcts(outcome_coef=0.5)
    found = workings(pipeline, [group], None, num_updates=1)
    trained = [row.any() for row in found.weights[0]]
    whole = [item.num_tokens == 24 or not item.is_truncated for item in group.rollouts]
    assert trained == whole


def quality(**changes) -> answer_quality.Quality:
    fields = {
        "is_right": True,
        "is_consistent": True,
        "is_repetitive": False,
        "has_fair_length": True,
    }
    return answer_quality.Quality(**{**fields, **changes})


def test_veripos_pairs_follow_the_rule():
    qualities = [
        quality(),
        quality(is_consistent=False),
        quality(is_right=False),
        quality(is_repetitive=True),
    ]
    assert pairs.penalty_rejects(qualities) == [2, 3]
    assert pairs.consistency_rejects(qualities) == [1]
    group = scored([rollout(i, 3) for i in range(4)], answer=[1.0, 1.0, 0.0, 1.0])
    assert pairs.answer_pairs(group, qualities) == ((0, 2), (0, 1))


def test_a_wrong_answer_ranks_below_an_inconsistent_one_and_that_below_a_repetitive_one():
    qualities = [
        quality(is_repetitive=True),
        quality(is_consistent=False, has_fair_length=False),
        quality(is_right=False, is_repetitive=True),
    ]
    assert pairs.penalty_rejects(qualities) == [2, 1, 0]


def test_the_longest_good_answer_is_preferred_and_no_good_answer_makes_no_pair():
    group = scored([rollout(0, 3), rollout(1, 5), rollout(2, 9)], answer=[1.0, 1.0, 0.0])
    assert pairs.answer_pairs(group, [quality(), quality(), quality(is_right=False)]) == ((1, 2),)
    assert pairs.answer_pairs(group, [quality(is_right=False)] * 3) == ()
    assert pairs.answer_pairs(group, [quality()] * 3) == ()


def test_repetition_is_the_share_of_runs_seen_before():
    assert answer_quality.repeated_share(
        np.array([1, 2, 1, 2, 1, 2], np.int32), ngram=2
    ) == pytest.approx(3 / 5)
    assert answer_quality.repeated_share(np.arange(6, dtype=np.int32), ngram=2) == 0
    assert answer_quality.repeated_share(np.array([1], np.int32), ngram=2) == 0


def a_judged_group() -> Group:
    rollouts = [
        a_rollout(0, [1, 2, 3, 4]),
        a_rollout(1, [5, 6, 7, 8]),
        a_rollout(2, [1, 1, 1, 1]),
        a_rollout(3, [1, 2, 3, 9], truncated=True),
    ]
    return scored(rollouts, answer=[1.0, 0.0, 1.0, 1.0], logic=[1.0, 1.0, 1.0, None])


def veripo(**settings):
    return halves("veripo", outcomes={"answer": 1.0, "logic": 0.0}, **settings)


def test_answers_are_checked_for_repetition_length_and_consistency():
    found = answer_quality.answer_qualities(
        a_judged_group(),
        right=np.array([True, False, True, True]),
        consistency_scorer="logic",
        ngram=2,
        max_repetition=0.3,
        min_tokens=1,
    )
    assert [item.is_good for item in found] == [True, False, False, False]
    assert [item.is_repetitive for item in found] == [False, False, True, False]
    assert [item.has_fair_length for item in found] == [True, True, True, False]


def test_veripos_stage_has_the_pairs_of_the_group_with_all_their_tokens():
    pipeline, objective = veripo(
        consistency_scorer="logic", repetition_ngram=2, dpo_pairs_per_update=4
    )
    group = a_judged_group()
    (item,) = workings(pipeline, [group], pipeline.initial_state, num_updates=1).rewarded
    assert pipeline.stage is not None
    rows = pipeline.stage.collect(item, pipeline.initial_state)
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [row.weights.tolist() for row in rows] == [[0.25] * 4] * 2
    assert [row.advantages[0] for row in rows] == [1.0, -1.0]
    assert pipeline.stage.learning_rate_scale == 0.5
    assert objective.stage is not None
    assert objective.stage.group_term is not None


def test_the_loss_of_the_stage_has_the_gradient_of_dpo():
    pipeline, objective = veripo(dpo_pairs_per_update=1, repetition_ngram=2)
    group = a_judged_group()
    (item,) = workings(pipeline, [group], pipeline.initial_state, num_updates=1).rewarded
    rows = pipeline.stage.collect(item, pipeline.initial_state)
    rng = np.random.default_rng(0)
    reference = flat([row.behaviour_log_probs for row in rows]) + rng.normal(0, 0.3, 8)
    now = torch.tensor(reference + rng.normal(0, 0.3, 8), requires_grad=True)
    gaps = (now - torch.tensor(reference)).reshape(2, 4).sum(1)
    expected = -torch.nn.functional.logsigmoid(0.1 * (gaps[0] - gaps[1]))
    (gradient,) = torch.autograd.grad(expected, now)

    scores = [
        row_score(float(row.advantages[0]), float(gap))
        for row, gap in zip(rows, gaps.detach(), strict=True)
    ]
    assert objective.stage is not None
    advantages = objective.stage.group_term(scores)
    labelled = [
        replace(row, advantages=np.full(4, value))
        for row, value in zip(rows, advantages, strict=True)
    ]
    again = torch.tensor(now.detach().numpy(), requires_grad=True)
    loss, _ = loss_and_metrics(
        objective.stage, loss_inputs(labelled, log_probs=again, proximal=reference)
    )
    (ours,) = torch.autograd.grad(loss, again)
    np.testing.assert_allclose(ours.numpy(), gradient.numpy(), atol=1e-12)


def test_veripo_without_its_parts_is_grpo():
    assert points("veripo", dpo=False, skip_solved_share=0) == points("grpo")


def test_most_prompts_that_were_solved_are_skipped_and_others_each_round():
    known = history.PromptHistory(all_right={str(i): True for i in range(400)} | {"hard": False})
    prompts = [Prompt(id=str(i), text="", tokens=np.zeros(1, np.int32)) for i in range(400)]

    def skipped(state):
        return {
            prompt.id
            for prompt in prompts
            if history.some_solved_last_time(prompt, state, share=0.8, round_steps=50)
        }

    first = skipped(known)
    assert 280 < len(first) < 360
    assert skipped(replace(known, num_steps=49)) == first
    assert skipped(replace(known, num_steps=50)) != first
    for name in ("hard", "new"):
        prompt = Prompt(id=name, text="", tokens=np.zeros(1, np.int32))
        assert history.some_solved_last_time(prompt, known, share=0.8, round_steps=50) is None


def test_a_group_without_a_pair_leaves_no_row():
    pipeline, _ = veripo()
    group = scored([rollout(i, 3) for i in range(3)], answer=[0.0] * 3, logic=[1.0] * 3)
    item = RewardedGroup(group=group, components=np.zeros((3, 1)))
    assert pipeline.stage is not None
    assert pipeline.stage.collect(item, pipeline.initial_state) == ()
    metrics = pipeline.metrics[0]([item], pipeline.initial_state)
    assert metrics == {"pairs/mean": 0.0, "pairs/frac_without": 1.0}


def test_the_rows_of_a_pair_are_numbered_masked_and_trained_after_the_train_context():
    plain, hinted = rollout(0, 3), rollout(1, 2, context=5)
    hinted = replace(hinted, train_context=np.array([7], np.int32))
    group = scored([plain, hinted], group=3, answer=[1.0, 0.0])
    better, worse = pairs.pair_rows(
        group,
        0,
        1,
        number=2,
        doubt=0.25,
        masks=[np.array([False, True, True]), np.array([True, False])],
        pairs_per_update=4,
    )
    assert better.group == worse.group == 3 * pairs.PAIRS_PER_GROUP + 2
    assert (better.index, worse.index) == (0, 1)
    assert (better.context.tolist(), worse.context.tolist()) == ([0, 1], [7])
    assert (better.is_cross_context, worse.is_cross_context) == (False, True)
    assert (better.weights.tolist(), worse.weights.tolist()) == ([0, 0.25, 0.25], [0.25, 0])
    assert (better.advantages.tolist(), worse.advantages.tolist()) == ([0.75] * 3, [-0.75] * 2)


def test_of_a_step_only_what_the_policy_wrote_last_is_trained():
    item = replace(rollout(0, 5, guidance=2), lineage=pieced(0, (0, 1), (1, 5)).lineage)
    assert pairs._last_piece(item).tolist() == [False, False, True, True, True]
    item = replace(item, lineage=pieced(0, (0, 3), (1, 5)).lineage)
    assert pairs._last_piece(item).tolist() == [False, False, False, True, True]


def test_an_answer_is_inconsistent_if_the_consistency_scorer_says_so():
    group = scored([rollout(i, 3) for i in range(3)], answer=[1.0] * 3, logic=[0.0, None, 1.0])
    for scorer, expected in (("logic", [False, True, True]), (None, [True] * 3)):
        found = answer_quality.answer_qualities(
            group,
            right=np.ones(3, bool),
            consistency_scorer=scorer,
            ngram=2,
            max_repetition=1.0,
            min_tokens=3,
        )
        assert [item.is_consistent for item in found] == expected


def test_a_search_of_depth_one_looks_into_the_chosen_steps_alone():
    pipeline, group, _ = searched(1, search_depth=1)
    chosen = search.searched(group, settings_of(pipeline)).chosen
    parents = {tuple(p.id for p in item.lineage)[:-1] for item in group.rollouts}
    assert len(parents) == len(chosen) - 1 > 1


def test_metrics_of_a_search_are_those_of_its_pairs_and_its_answer():
    pipeline, group, _ = searched(2)
    (item,) = workings(pipeline, [group], None, num_updates=1).rewarded
    settings = settings_of(pipeline)
    found = search.search_metrics([item, item], None, settings=settings)
    doubts = [pair.doubt for pair in search.step_pairs(group, settings)]
    place = search.searched(group, settings).chosen[-1].place
    assert doubts
    assert found == {
        "search/num_pairs": len(doubts),
        "search/mean_doubt": pytest.approx(np.mean(doubts)),
        "search/chosen_reward": pytest.approx(float(item.rewards[place])),
    }
