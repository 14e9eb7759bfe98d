"""TreeRL, TreePO and SPO: credits worked by hand, invariances, degenerate trees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo import chain_values, cut_points, tree_credit, trees
from grpo.pipeline import RewardedGroup
from grpo.types import Group
from tests.unit.grpo_groups import rollout, scored
from tests.unit.tree_groups import pieced, two_by_two

JUDGES = {"answer": 1.0}
ALL = np.ones(4, bool)


def rewarded(group: Group) -> RewardedGroup:
    values = [np.nan if v is None else v for v in group.outcomes("answer")]
    return RewardedGroup(group=group, components=np.array(values, np.float64)[:, None])


def credits(group: Group, *, kept=ALL, form="code", sqrt=True) -> dict[str, float]:
    """By name of the node of `two_by_two`."""
    tree = trees.tree_of(group.rollouts)
    credit = tree_credit.code_credit if form == "code" else tree_credit.paper_credit
    values = credit(tree, rewarded(group).rewards, is_kept=kept, root_of_leaves=sqrt)
    (a, a1), (_, a0), (b, b1), (_, b2) = tree.paths
    nodes = {"a": a, "a1": a1, "a0": a0, "b": b, "b1": b1, "b2": b2}
    return {name: values[node] for name, node in nodes.items()}


def close(found: dict[str, float], **expected: float) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_treerls_code_credit_is_the_one_worked_by_hand():
    # x = 1/3, -1, 1/3, 1/3; mu = -2/22 = -0.090909
    found = credits(two_by_two())
    close(found, a=-0.388294, a1=1.019905, a0=-1.646762, b=0.554515, b1=0.548500, b2=0.548500)


def test_leaves_that_are_not_trained_on_count_in_values_but_not_under_the_root():
    kept = np.array([True, True, True, False])
    found = credits(two_by_two(), kept=kept)
    # b1 has the value of b, so it takes over b's step value.
    close(found, a=-0.395326, a1=1.019905, a0=-1.646762, b=0.795998, b1=0.795998)


def test_without_the_root_of_leaves_only_the_weighting_is_gone():
    found = credits(two_by_two(), sqrt=False)
    close(found, a=-0.575758, a1=1.090909, a0=-1.575758, b=0.757576, b1=0.757576)


def test_treerls_paper_form_is_the_one_worked_by_hand():
    found = credits(two_by_two(), form="paper")
    close(found, a=-0.353553, b=0.353553, a1=0.75, a0=-1.25, b1=0.25, b2=0.25)


def test_on_answers_without_forks_the_papers_form_is_twice_the_centred_reward():
    group = scored([rollout(i, 3) for i in range(4)], answer=[1.0, 0.0, 0.0, 0.0])
    tree = trees.tree_of(group.rollouts)
    values = tree_credit.paper_credit(
        tree, rewarded(group).rewards, is_kept=ALL, root_of_leaves=True
    )
    np.testing.assert_allclose(values[1:], [1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("rewards", [(1, 1, 1, 1), (0.3, 0.3, 0.3, 0.3), (None, None, None, 1)])
def test_leaves_of_equal_reward_have_no_credit(form, rewards):
    assert all(value == 0 for value in credits(two_by_two(rewards), form=form).values())


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_leaf_without_a_reward_is_in_no_value(form):
    with_it = credits(two_by_two((1, 0, 1, None)), form=form)
    assert np.isfinite(list(with_it.values())).all()
    assert with_it["b2"] == 0
    assert with_it["a1"] > 0 > with_it["a0"]


@pytest.mark.parametrize("form", ["code", "paper"])
def test_adding_a_constant_to_rewards_changes_no_credit(form):
    plain, shifted = (credits(two_by_two(r), form=form) for r in ((1, 0, 1, 1), (3, 2, 3, 3)))
    close(plain, **shifted)


def test_credits_stand_on_every_token_of_their_node():
    group = two_by_two()
    (rows,) = tree_credit.state_values(
        [rewarded(group)], None, keep=4, weights=JUDGES, form="code", root_of_leaves=True
    )
    np.testing.assert_allclose(rows[0], [-0.388294] * 3 + [1.019905] * 2, atol=1e-6)
    np.testing.assert_allclose(rows[1], [-0.388294] * 3 + [-1.646762] * 4, atol=1e-6)


def test_the_leaves_trained_on_are_the_same_each_time_and_have_a_right_one():
    group = replace(scored([rollout(i, 2) for i in range(12)], answer=[0.0] * 11 + [1.0]), id=3)
    first = tree_credit.chosen_leaves(group, None, keep=4, weights=JUDGES)
    assert first.sum() == 4
    np.testing.assert_array_equal(
        first, tree_credit.chosen_leaves(group, None, keep=4, weights=JUDGES)
    )
    for number in range(20):
        kept = tree_credit.chosen_leaves(replace(group, id=number), None, keep=4, weights=JUDGES)
        assert kept[11]
        assert kept.sum() == 4
    others = [
        tree_credit.chosen_leaves(replace(group, id=n), None, keep=4, weights=JUDGES).tolist()
        for n in range(5)
    ]
    assert len({tuple(kept) for kept in others}) > 1
    assert tree_credit.chosen_leaves(group, None, keep=16, weights=JUDGES).all()


def test_treepos_leaf_advantages_are_those_worked_by_hand():
    group = two_by_two()
    rewards = rewarded(group).rewards
    average = tree_credit.subtree_values(group.rollouts, rewards, by_size=False, drop=False)
    np.testing.assert_allclose(average, [0.375, -0.625, 0.125, 0.125])
    sized = tree_credit.subtree_values(group.rollouts, rewards, by_size=True, drop=False)
    np.testing.assert_allclose(sized, [1 / 3, -2 / 3, 1 / 6, 1 / 6])


def test_dropping_constant_subtrees_leaves_their_leaves_the_whole_group():
    group = two_by_two()
    values = tree_credit.subtree_values(
        group.rollouts, rewarded(group).rewards, by_size=False, drop=True
    )
    np.testing.assert_allclose(values, [0.375, -0.625, 0.25, 0.25])


def test_treepo_whitens_over_the_tokens_of_the_step():
    leaves = [
        pieced(0, (0, 1), (2, 4)),
        pieced(1, (0, 1), (3, 2)),
        pieced(2, (1, 1), (4, 3)),
        pieced(3, (1, 1), (5, 3)),
    ]
    group = scored(leaves, answer=[1.0, 0.0, 1.0, 1.0])
    (rows,) = tree_credit.subtree_centred(
        [rewarded(group)], None, by_size=False, drop_constant=False
    )
    found = [row[0] for row in rows]
    np.testing.assert_allclose(found, [0.831279, -2.018822, 0.118754, 0.118754], atol=1e-6)
    assert all(len(set(row.tolist())) == 1 for row in rows)


def test_a_leaf_that_is_alone_is_compared_with_the_whole_group_only():
    leaves = [pieced(0, (0, 2), (1, 4)), pieced(1, (0, 2), (2, 4)), rollout(2, 3)]
    values = tree_credit.subtree_values(
        leaves, np.array([1.0, 0.0, 0.5]), by_size=False, drop=False
    )
    np.testing.assert_allclose(values, [0.5, -0.5, 0.0])


def test_a_leaf_without_a_reward_has_no_advantage_and_is_in_no_mean():
    group = two_by_two((1, 0, None, 1))
    values = tree_credit.subtree_values(
        group.rollouts, rewarded(group).rewards, by_size=False, drop=False
    )
    # Whole group: mean 2/3 of 1, 0, 1. Below a: mean 1/2. Leaf b2 is alone with its reward.
    np.testing.assert_allclose(values, [(1 / 3 + 0.5) / 2, (-2 / 3 - 0.5) / 2, np.nan, 1 / 3])
    (rows,) = tree_credit.subtree_centred(
        [rewarded(group)], None, by_size=False, drop_constant=False
    )
    assert not rows[2].any()


@pytest.mark.parametrize(
    ("baseline", "ddof", "expected"),
    [
        ("leave_one_out", 0, [1 / 3, -1 / 3, -2 / 3, 2 / 3]),
        ("mean", 0, [0.25, -0.25, -0.5, 0.5]),
        ("standardized", 0, [0.632456, -0.632456, -1.264911, 1.264911]),
        ("standardized", 1, [0.547723, -0.547723, -1.095445, 1.095445]),
    ],
)
def test_siblings_are_compared_as_worked_by_hand(baseline, ddof, expected):
    found = tree_credit.against_siblings(
        np.array([0.75, 0.25, 0, 1]), baseline=baseline, ddof=ddof, eps=1e-8
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_edge_has_the_advantage_of_its_node_over_its_siblings():
    group = two_by_two((1, 0, 1, 1))
    (rows,) = tree_credit.sibling_advantages(
        [rewarded(group)], None, baseline="leave_one_out", ddof=0, eps=0.0
    )
    # a is worth 1/2, b 1; below a 1 and 0; below b all the same.
    np.testing.assert_allclose(rows[0], [-0.5] * 3 + [1.0] * 2)
    np.testing.assert_allclose(rows[1], [-0.5] * 3 + [-1.0] * 4)
    np.testing.assert_allclose(rows[2], [0.5] * 2 + [0.0] * 3)


def test_a_node_is_worth_the_mean_of_its_children_and_not_of_its_leaves():
    leaves = [
        pieced(0, (0, 2), (1, 4), (3, 6)),
        pieced(1, (0, 2), (1, 4), (4, 6)),
        pieced(2, (0, 2), (2, 4)),
    ]
    tree = trees.tree_of(leaves)
    values = tree_credit.node_values(tree, np.array([1.0, 1.0, 0.0]))
    assert values[trees.ROOT] == values[tree.paths[0][0]] == 0.5


def test_edges_that_are_worth_the_same_leave_the_mean():
    group = two_by_two((1, 0, 1, 1))
    masks = tree_credit.edges_with_advantage(group, None, rewards=(_outcome,))
    assert [mask.tolist() for mask in masks] == [
        [True] * 5,
        [True] * 7,
        [True] * 2 + [False] * 3,
        [True] * 2 + [False] * 3,
    ]
    equal = tree_credit.edges_with_advantage(two_by_two((1, 1, 1, 1)), None, rewards=(_outcome,))
    assert not any(mask.any() for mask in equal)


def _outcome(group, state):
    return rewarded(group).rewards


def probable(*values: float):
    return rollout(0, len(values), log_probs=np.log(values).tolist())


def test_a_chain_is_cut_before_every_other_unlikely_token():
    chain = probable(0.99, 0.5, 0.95, 0.3, 0.2, 0.97, 0.85, 0.6)
    cuts = cut_points.unlikely_cuts(chain, probability=0.9, interval=2)
    assert cuts == (1, 4, 7)
    gains = chain_values.segment_gains(cuts, [0.4, 0.8, 0.5], final=1.0, length=8)
    certain = cut_points.is_certain(chain, probability=0.9)
    np.testing.assert_allclose(
        np.where(certain, 0, gains), [0, 0.4, 0, 0.4, -0.3, 0, -0.3, 0.5], atol=1e-12
    )


def test_a_chain_that_begins_with_an_unlikely_token_is_compared_with_its_prompt():
    chain = probable(0.5, 0.95, 0.3, 0.99, 0.6)
    cuts = cut_points.unlikely_cuts(chain, probability=0.9, interval=1)
    assert cuts == (0, 2, 4)
    gains = chain_values.segment_gains(cuts, [0.25, 0.5, 0.75], final=0.0, length=5)
    certain = cut_points.is_certain(chain, probability=0.9)
    np.testing.assert_allclose(np.where(certain, 0, gains), [0.25, 0, 0.25, 0, -0.75])


def test_a_chain_of_certain_tokens_has_no_cut_and_no_advantage():
    chain = probable(0.95, 0.99)
    assert cut_points.unlikely_cuts(chain, probability=0.9, interval=1) == ()
    assert not cut_points.is_certain(probable(1.0, 0.5), probability=1.0).any()
    assert cut_points.unlikely_cuts(probable(1.0, 0.5), probability=1.0, interval=1) == (1,)
    assert not chain_values.segment_gains((), [], final=1.0, length=2).any()


def test_a_prefix_is_worth_the_mean_of_its_own_continuations():
    answers = [pieced(0, (0, 6)), rollout(1, 4), rollout(2, 3)]
    more = [pieced(3, (0, 2), (1, 5)), pieced(4, (0, 2), (2, 5)), pieced(5, (0, 4), (3, 6))]
    item = rewarded(scored([*answers, *more], answer=[1.0, 0.0, 0.5, 1.0, 0.0, 1.0]))
    known = chain_values.continuations(item.group)
    assert known == {(0, 0): [1, 2], (1, 0): [0, 2], (2, 0): [0, 1], (0, 2): [3, 4], (0, 4): [5]}
    assert chain_values.prefix_value(item.rewards, known[0, 2]) == 0.5
    assert chain_values.prefix_value(item.rewards, known[0, 0]) == 0.25
    assert np.isnan(chain_values.prefix_value(item.rewards, []))


def test_a_value_that_is_missing_gives_no_credit_on_either_side():
    gains = chain_values.segment_gains((1, 3, 5), [0.5, np.nan, 1.0], final=0.0, length=6)
    np.testing.assert_array_equal(gains, [0, 0, 0, 0, 0, -1])


def test_the_most_surprising_tokens_come_first_and_never_where_it_branched_off():
    chain = pieced(0, (0, 5), log_probs=[-9, -1, -3, -2, -0.1])
    fork = pieced(1, (0, 2), (1, 5), log_probs=[-9, -1, -7, -4, -0.2])
    places = cut_points.surprising_places([chain, fork], [0, 1], num=3)
    # Not token 0, where the answer begins; not token 2, before which the fork branched off.
    assert [(p.rollout, p.end) for p in places] == [(1, 3), (0, 3), (0, 1)]
