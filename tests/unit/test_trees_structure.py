"""Which tokens rollouts share, and what follows from it: nodes, paths, training an edge once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from grpo import advantage, trees
from grpo.algorithms import ALGORITHMS
from grpo.pipeline import RewardedGroup
from grpo.types import Group, Piece
from tests.unit.grpo_groups import random_groups, rollout, scored
from tests.unit.tree_groups import TreeEngine, grown, pieced, two_by_two


def rewarded(group: Group) -> RewardedGroup:
    values = [np.nan if v is None else v for v in group.outcomes("answer")]
    return RewardedGroup(group=group, components=np.array(values, np.float64)[:, None])


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ([(0, 5), (1, 9)], [(0, 3), (2, 8)], 3),  # cut at 3, and at 5
        ([(0, 5), (1, 9)], [(0, 5), (2, 8)], 5),
        ([(0, 5)], [(0, 5), (2, 8)], 5),  # one goes on where the other ends
        ([(0, 5)], [(0, 2), (2, 8)], 2),
        ([(0, 5)], [(1, 5)], 0),
        ([(0, 3), (1, 7), (2, 9)], [(0, 3), (1, 5), (3, 9)], 5),
    ],
)
def test_tokens_are_shared_up_to_the_last_common_piece(one, other, shared):
    assert trees.shared_tokens(pieced(0, *one), pieced(1, *other)) == shared
    assert trees.shared_tokens(pieced(0, *other), pieced(1, *one)) == shared


def test_rollouts_without_a_lineage_share_nothing_however_equal_they_are():
    tree = trees.tree_of([rollout(0, 4), rollout(1, 4)])
    assert [(n.start, n.end, n.leaves) for n in tree.nodes[1:]] == [(0, 4, (0,)), (0, 4, (1,))]


def test_the_tree_of_two_by_two_has_seven_nodes():
    tree = trees.tree_of(two_by_two().rollouts)
    found = {(n.start, n.end): n.leaves for n in tree.nodes}
    assert len(tree.nodes) == 7
    assert found[0, 0] == (0, 1, 2, 3)
    assert found[0, 3] == (0, 1)
    assert found[0, 2] == (2, 3)
    assert {(3, 5), (3, 7), (2, 5)} <= set(found)
    assert all(tree.nodes[path[0]].parent == trees.ROOT for path in tree.paths)
    for place, path in enumerate(tree.paths):
        assert all(place in tree.nodes[node].leaves for node in path)


def test_a_rollout_that_others_continue_ends_at_their_common_node():
    tree = trees.tree_of([pieced(0, (0, 5)), pieced(1, (0, 5), (1, 8)), pieced(2, (0, 2), (2, 6))])
    assert [(n.start, n.end, n.leaves) for n in tree.nodes[1:]] == [
        (0, 2, (0, 1, 2)),
        (2, 5, (0, 1)),
        (2, 6, (2,)),
        (5, 8, (1,)),
    ]
    assert tree.paths == ((1, 2), (1, 2, 4), (1, 3))


def test_every_token_of_a_grown_tree_lies_in_one_node_of_its_path():
    pipeline = spo_tree()
    group = grown(pipeline, engine=TreeEngine(ends=0.03))
    tree = trees.tree_of(group.rollouts)
    assert len(group.rollouts) > 9
    for item, path in zip(group.rollouts, tree.paths, strict=True):
        bounds = [(tree.nodes[node].start, tree.nodes[node].end) for node in path]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == item.num_tokens
        assert all(left[1] == right[0] for left, right in pairwise(bounds))
    for node in tree.nodes:  # what a node says is shared is equal, token by token
        parts = [group.rollouts[leaf].tokens[: node.end].tolist() for leaf in node.leaves]
        assert all(part == parts[0] for part in parts)


def spo_tree(**settings):
    chosen = {"num_generations": 3, "segment_tokens": 4, "num_levels": 3, **settings}
    algorithm = ALGORITHMS["spo_tree"]
    return algorithm.pipeline(
        algorithm.config(**chosen), outcomes={"answer": 1.0}, max_completion_length=24
    )


def test_a_token_that_is_shared_is_trained_in_the_first_row_alone():
    group = two_by_two()
    masks = trees.oldest_sharer_only(group, None)
    assert [mask.tolist() for mask in masks] == [
        [True] * 5,
        [False] * 3 + [True] * 4,
        [True] * 5,
        [False] * 2 + [True] * 3,
    ]
    without_first = partial(_only, places=(1, 2, 3))
    masks = trees.oldest_sharer_only(group, None, among=without_first)
    assert [int(mask.sum()) for mask in masks] == [0, 7, 5, 3]
    by_last_token = [np.arange(r.num_tokens) == r.num_tokens - 1 for r in group.rollouts]
    partly = trees.oldest_sharer_only(group, None, among=lambda group, state: by_last_token)
    assert [int(mask.sum()) for mask in partly] == [5, 4, 5, 3]  # all rollouts are trained


def _only(group, state, *, places):
    return [np.full(r.num_tokens, i in places) for i, r in enumerate(group.rollouts)]


def test_training_once_on_the_mean_of_the_sharers_keeps_the_sum_over_them():
    groups = [rewarded(two_by_two((1.0, 0.0, 0.5, 0.25)))]
    plain = advantage.centred(groups, None)[0]
    averaged = trees.averaged_over_sharers(groups, None, advantage=advantage.centred)[0]
    masks = trees.oldest_sharer_only(groups[0].group, None)
    # The shared 3 tokens of a: (0.5625 - 0.4375) / 2 = 0.0625 in both leaves.
    np.testing.assert_allclose(averaged[0][:3], np.mean([plain[0][0], plain[1][0]]))
    np.testing.assert_allclose(averaged[0][3:], plain[0][3:])
    for place in range(4):  # unshared tokens are trained in their own row
        assert masks[place][-1]
    assert sum(int(mask.sum()) for mask in masks) == 3 + 2 + 2 + 4 + 3 + 3


def test_without_sharing_nothing_changes():
    for group in random_groups(0, num_groups=3, num_generations=4):
        assert all(mask.all() for mask in trees.oldest_sharer_only(group, None))
        item = [rewarded(group)]
        left = trees.averaged_over_sharers(item, None, advantage=advantage.centred)[0]
        for mine, theirs in zip(left, advantage.centred(item, None)[0], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_shape_says_how_many_tokens_sharing_saved():
    found = trees.shape_metrics([rewarded(two_by_two())], None)
    assert found["trees/frac_tokens_shared"] == pytest.approx(1 - 17 / 22)
    assert found["trees/mean_depth"] == 2
    assert found["trees/num_leaves"] == 4
    flat = scored([rollout(0, 3), rollout(1, 2)], answer=[1.0, 0.0])
    assert trees.shape_metrics([rewarded(flat)], None)["trees/frac_tokens_shared"] == 0


def test_an_order_of_rollouts_changes_no_node():
    group = two_by_two()
    order = [2, 0, 3, 1]
    turned = replace(group, rollouts=tuple(group.rollouts[place] for place in order))
    plain, other = trees.tree_of(group.rollouts), trees.tree_of(turned.rollouts)
    names = {(n.start, n.end, frozenset(n.leaves)) for n in plain.nodes}
    assert names == {
        (n.start, n.end, frozenset(order[leaf] for leaf in n.leaves)) for n in other.nodes
    }


def test_the_last_piece_is_what_was_sampled_last():
    item = pieced(0, (0, 3), (1, 7))
    assert trees.last_piece_start(item) == 3
    assert trees.num_pieces(item) == 2
    assert trees.last_piece_start(rollout(0, 5)) == 0
    assert item.lineage == (Piece(id=0, end=3), Piece(id=1, end=7))
