"""Trees that the real group task grows with a small policy: shapes, shared tokens, trained rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from grpo import tree_plans, trees
from grpo.batch import build_batch
from grpo.pipeline import Pipeline
from grpo.types import FinishReason, Group, Origin
from tests.unit.family_cases import halves
from tests.unit.grpo_groups import random_groups, rollout, scored
from tests.unit.tree_groups import TreeEngine, grown, has_even_sum

TREES = {
    "treepo": {"num_generations": 8, "segment_tokens": 4},
    "treerl": {"num_generations": 4, "num_kept": 8},
    "spo_tree": {"num_generations": 3, "segment_tokens": 5},
    "spo_chain": {"num_generations": 3, "cut_interval": 2, "cut_below": 0.6},
}


def pipeline_of(name: str, **settings) -> Pipeline:
    return halves(name, length=24, **{**TREES[name], **settings})[0]


def rows_of(pipeline: Pipeline, *groups: Group):
    built = build_batch(pipeline, groups, None, step=0, version=0, num_updates=1)
    return built.batch.updates[0], built.metrics


def endless() -> TreeEngine:
    """Never ends an answer by itself."""
    return TreeEngine(ends=0.0)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("number", range(4))
def test_a_grown_group_is_whole_and_its_numbers_are_finite(name, number):
    group = grown(pipeline_of(name), number=number)
    for item in group.rollouts:
        assert item.finish_reason is FinishReason.STOP or item.num_tokens == 24
        assert not item.lineage or item.lineage[-1].end == item.num_tokens
        assert (item.origins == Origin.POLICY).all()
        assert (item.log_probs[item.tokens != 0] <= 0).all()
    rows, metrics = rows_of(pipeline_of(name), group)
    for row in rows:
        assert np.isfinite(row.advantages).all()
        assert np.isfinite(row.weights).all()
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize("name", TREES)
def test_growing_again_makes_the_same_group(name):
    once, twice = (grown(pipeline_of(name)) for _ in range(2))
    assert [r.tokens.tolist() for r in once.rollouts] == [r.tokens.tolist() for r in twice.rollouts]
    assert [r.lineage for r in once.rollouts] == [r.lineage for r in twice.rollouts]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_tree_of_equal_answers_teaches_exactly_nothing(name, value):
    group = grown(pipeline_of(name), answer=lambda rollout, span: value)
    rows, _ = rows_of(pipeline_of(name), group)
    assert all((row.advantages == 0).all() for row in rows)


def test_a_uniform_tree_of_three_levels_has_27_leaves():
    engine = endless()
    group = grown(pipeline_of("spo_tree"), engine=engine)
    assert engine.waves == 3
    assert len(group.rollouts) == 27
    assert {item.num_tokens for item in group.rollouts} == {24}
    assert {tuple(piece.end for piece in item.lineage) for item in group.rollouts} == {(5, 10, 24)}
    tree = trees.tree_of(group.rollouts)
    assert Counter(len(node.leaves) for node in tree.nodes) == {27: 1, 9: 3, 3: 9, 1: 27}


@pytest.mark.parametrize("number", range(3))
def test_answers_that_end_early_make_a_uniform_tree_no_deeper(number):
    group = grown(pipeline_of("spo_tree"), number=number, engine=TreeEngine(ends=0.1))
    pieces = {trees.num_pieces(item) for item in group.rollouts}
    assert min(pieces) < 3
    assert max(pieces) == 3
    for item in group.rollouts:
        assert item.finish_reason is FinishReason.STOP or trees.num_pieces(item) == 3


@pytest.mark.parametrize(
    ("room", "num", "most", "expected"),
    [(3, 2, 9, [2, 1]), (5, 2, 1, [1, 1]), (0, 3, 1, [0, 0, 0]), (8, 3, 3, [3, 3, 2])],
)
def test_room_is_handed_out_in_turn(room, num, most, expected):
    assert tree_plans._in_turn(room, num, most=most) == expected


def test_an_edge_of_a_uniform_tree_is_trained_once():
    group = grown(pipeline_of("spo_tree", drop_equal_edges=False), engine=endless())
    rows, _ = rows_of(pipeline_of("spo_tree", drop_equal_edges=False), group)
    num_trained = sum(int((row.weights > 0).sum()) for row in rows)
    assert num_trained == 3 * 5 + 9 * 5 + 27 * 14
    each, _ = rows_of(pipeline_of("spo_tree", drop_equal_edges=False, shared_tokens="each"), group)
    assert sum(int((row.weights > 0).sum()) for row in each) == 27 * 24


def test_edges_of_equal_worth_are_not_trained():
    pipeline = pipeline_of("spo_tree")
    group = grown(pipeline, engine=endless())
    rows, _ = rows_of(pipeline, group)
    trained = [row.advantages[row.weights > 0] for row in rows]
    assert all((part != 0).all() for part in trained)
    plain, _ = rows_of(pipeline_of("spo_tree", drop_equal_edges=False), group)
    assert sum(map(len, trained)) < sum(int((row.weights > 0).sum()) for row in plain)


@pytest.mark.parametrize("number", range(5))
def test_a_segment_tree_always_ends_with_its_number_of_leaves(number):
    group = grown(pipeline_of("treepo"), number=number, engine=TreeEngine(ends=0.15))
    assert len(group.rollouts) == 8


def test_a_segment_tree_doubles_until_it_is_full_and_goes_on():
    engine = endless()
    group = grown(pipeline_of("treepo"), engine=engine)
    assert engine.waves == 6  # 24 tokens in segments of 4
    assert len(group.rollouts) == 8
    tree = trees.tree_of(group.rollouts)
    # 2 roots, 4, then 8 chains that are one node each, as nothing branches any more.
    assert Counter(len(node.leaves) for node in tree.nodes) == {8: 1, 4: 2, 2: 4, 1: 8}
    assert {len(item.lineage) for item in group.rollouts} == {6}


def test_a_segment_tree_whose_answers_end_at_once_is_filled_up_from_the_prompt():
    group = grown(pipeline_of("treepo"), engine=TreeEngine(ends=1.0))
    assert len(group.rollouts) == 8
    assert not any(item.lineage for item in group.rollouts)


def test_without_branching_treepo_is_reinforce_pp_with_baseline_to_the_last_bit():
    plain = halves("reinforce_pp_baseline", epsilon_high=0.28)[0]
    ours = pipeline_of("treepo", num_generations=4)
    groups = random_groups(1, num_groups=3, num_generations=4)
    assert_equal_rows(rows_of(ours, *groups)[0], rows_of(plain, *groups)[0])


def test_treepo_that_trains_once_has_the_mean_advantage_of_the_leaves():
    group = grown(pipeline_of("treepo"), engine=endless())
    each, _ = rows_of(pipeline_of("treepo"), group)
    once, _ = rows_of(pipeline_of("treepo", shared_tokens="once"), group)
    tree = trees.tree_of(group.rollouts)
    root = tree.nodes[tree.paths[0][0]]
    mean = np.mean([each[leaf].advantages[0] for leaf in root.leaves])
    np.testing.assert_allclose(once[0].advantages[: root.end], mean, atol=1e-6)
    num_tokens = sum(node.num_tokens for node in tree.nodes)
    assert sum(int((row.weights > 0).sum()) for row in once) == num_tokens
    assert sum(row.weights.sum() for row in once) == pytest.approx(1.0)


def test_surprise_forks_make_chains_times_one_plus_forks_leaves():
    engine = endless()
    group = grown(pipeline_of("treerl"), engine=engine)
    assert engine.waves == 2
    assert len(group.rollouts) == 4 * (1 + 2 * 2)
    for place, chain in enumerate(group.rollouts[:4]):
        worst = set(np.argsort(chain.log_probs[1:])[:2] + 1)
        forks = group.rollouts[4 + 4 * place : 8 + 4 * place]
        assert {fork.lineage[0].end for fork in forks} == worst
        for fork in forks:
            end = fork.lineage[0].end
            assert fork.lineage[0].id == chain.lineage[0].id
            np.testing.assert_array_equal(fork.tokens[:end], chain.tokens[:end])
            np.testing.assert_array_equal(fork.log_probs[:end], chain.log_probs[:end])


def test_a_second_round_forks_every_tree_again():
    engine = endless()
    group = grown(pipeline_of("treerl", num_rounds=2), engine=engine)
    assert engine.waves == 3
    assert len(group.rollouts) == 4 * (1 + 2 * 2 * 2)
    chains = Counter(item.lineage[0].id for item in group.rollouts)
    assert set(chains.values()) == {9}


def test_treerl_trains_on_the_kept_leaves_alone():
    pipeline = pipeline_of("treerl")
    group = grown(pipeline, engine=endless())
    rows, _ = rows_of(pipeline, group)
    assert len(rows) == 8
    once, _ = rows_of(pipeline_of("treerl", shared_tokens="once"), group)
    assert sum(int((r.weights > 0).sum()) for r in once) < sum(
        int((r.weights > 0).sum()) for r in rows
    )


def test_a_chain_is_valued_by_continuations_that_nobody_trains_on():
    pipeline = pipeline_of("spo_chain")
    engine = TreeEngine()
    group = grown(pipeline, engine=engine)
    assert engine.waves == 2
    assert len(group.rollouts) > 3
    rows, metrics = rows_of(pipeline, group)
    assert {row.index for row in rows} <= {0, 1, 2}
    assert metrics["segments/num_continuations"] == len(group.rollouts) - 3
    cuts = [np.flatnonzero(np.exp(r.log_probs) < 0.6)[::2] for r in group.rollouts[:3]]
    assert metrics["segments/mean_cuts"] == pytest.approx(np.mean([len(cut) for cut in cuts]))
    assert metrics["segments/reward"] == pytest.approx(np.mean(group.outcomes("answer")[:3]))
    for row in rows:
        likely = np.exp(row.behaviour_log_probs) > 0.6
        assert not row.weights[likely].any()
        assert not row.advantages[likely].any()


def test_a_chain_segment_is_worth_what_its_continuations_say():
    pipeline = pipeline_of("spo_chain", cut_interval=1)
    group = grown(pipeline, answer=has_even_sum)
    (advantages,) = [pipeline.advantage([rewarded_of(pipeline, group)], None)[0]]
    chain = group.rollouts[0]
    right = [bool(v) for v in group.outcomes("answer")]
    unlikely = np.flatnonzero(np.exp(chain.log_probs) < 0.6)
    for start, end in zip(unlikely, [*unlikely[1:], chain.num_tokens], strict=True):
        before = value_by_hand(group, right, int(start))
        then = float(right[0]) if end == chain.num_tokens else value_by_hand(group, right, int(end))
        assert advantages[0][start] == pytest.approx(then - before)


def rewarded_of(pipeline, group):
    from grpo.batch import workings

    return workings(pipeline, [group], None, num_updates=1).rewarded[0]


def value_by_hand(group: Group, right: list[bool], end: int) -> float:
    """Of the prefix of rollout 0: over the other rollouts that were sampled from it."""
    chain = group.rollouts[0]
    if end == 0:
        return float(np.mean(right[1:3]))
    found = []
    for place, item in enumerate(group.rollouts[3:], start=3):
        origin = item.lineage[0]
        if origin.end == end and origin.id == chain.lineage[0].id:
            found.append(right[place])
    assert len(found) == 4
    return float(np.mean(found))


def test_a_tree_of_one_level_is_rloo_with_a_token_ratio_to_the_last_bit():
    settings = {"num_levels": 1, "shared_tokens": "each", "drop_equal_edges": False}
    ours = pipeline_of("spo_tree", **settings)
    plain = halves("rloo", ratio="token", num_generations=3)[0]
    groups = random_groups(2, num_groups=3, num_generations=3)
    assert_equal_rows(rows_of(ours, *groups)[0], rows_of(plain, *groups)[0])
    assert ours.plan(scored([rollout(0, 2)], answer=[1.0]), None) == ()


def assert_equal_rows(ours, theirs):
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(row.advantages, other.advantages)
        np.testing.assert_array_equal(row.weights, other.weights)
        np.testing.assert_array_equal(row.policy_weights, other.policy_weights)
