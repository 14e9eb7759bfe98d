"""Members that choose among rollouts or combine rewards: numbers worked by hand, re-indexing."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from grpo import rewards, subsets
from grpo.algorithms import ALGORITHMS
from grpo.difficulty import MeanRewards, by_difficulty, remember_means
from grpo.pipeline import RewardedGroup
from grpo.step_advantage import decoupled_values
from grpo.types import Dropped, Score, Span, StepReport
from orchestration.checkpoint import decoded_state, encoded_state
from tests.unit.family_cases import (
    advantages_of,
    differing_points,
    halves,
    loss_and_gradient,
    points,
    rows_of,
)
from tests.unit.grpo_groups import loss_inputs, random_groups, rollout, scored

# GFPO's worked group
REWARDS = [0, 1, 1, 0, 1, 0]
LENGTHS = [40, 100, 600, 60, 200, 500]


def group_of(rewards, lengths=None, *, group=0, **more):
    numbers = [2] * len(rewards) if lengths is None else lengths
    return scored(
        [rollout(i, n) for i, n in enumerate(numbers)], group=group, answer=rewards, **more
    )


def test_a_subset_is_numbered_anew_with_its_scores():
    group = group_of([0.1, 0.2, 0.3, 0.4], [5, 6, 7, 8], style=[1, 2, 3, 4])
    step = Score(scorer="steps", span=Span(rollout=3, start=2, end=5), value=0.9)
    group = type(group)(
        id=9, prompt=group.prompt, rollouts=group.rollouts, scores=(*group.scores, step)
    )
    found = subsets.subset(group, (3, 1))
    assert [r.num_tokens for r in found.rollouts] == [8, 6]
    assert [r.index for r in found.rollouts] == [0, 1]
    assert found.outcomes("answer") == [0.4, 0.2]
    assert found.outcomes("style") == [4, 2]
    assert found.scores[-1].span == Span(rollout=0, start=2, end=5)
    assert (found.id, found.prompt) == (9, group.prompt)


def test_a_subset_of_all_rollouts_in_order_is_the_group():
    group = group_of([0.1, 0.2, 0.3])
    found = subsets.subset(group, (0, 1, 2))
    assert found.scores == group.scores
    assert [r.index for r in found.rollouts] == [0, 1, 2]


def chosen(rewards, keep):
    values = np.array(rewards, np.float64)
    return subsets.most_varied(values, np.zeros(len(values)), keep)


def test_the_most_varied_rewards_are_those_worked_by_hand():
    values = [0.1, 0.9, 0.4, 0.5, 1, 0, 0.45, 0.95]
    assert chosen(values, 4) == (0, 4, 5, 7)
    assert np.var([values[place] for place in chosen(values, 4)]) == pytest.approx(
        0.215469, abs=1e-6
    )


def test_the_most_varied_rewards_have_the_variance_that_brute_force_finds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.choice([rng.random(8), rng.integers(0, 3, 8) / 2]).astype(np.float64)
        keep = int(rng.integers(1, 9))
        best = max(np.var(values[list(places)]) for places in combinations(range(8), keep))
        found = chosen(values, keep)
        assert len(set(found)) == keep
        assert np.var(values[list(found)]) == pytest.approx(best)


@pytest.mark.parametrize(
    ("rewards", "keep", "places"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0], 4, {0, 1}),  # k = 2 of the ones
        ([1, 0, 0, 0, 0, 0, 0, 0], 4, {0}),  # k = 1
        ([1, 1, 1, 1], 4, {0, 1, 2, 3}),  # keeping all is no choice
        ([1, None, 0, None], 4, {0, 2}),  # without a reward there is nothing to compare
    ],
)
def test_the_most_varied_binary_rewards_are_half_and_half_where_they_can_be(rewards, keep, places):
    found = chosen([np.nan if r is None else r for r in rewards], keep)
    assert places <= set(found)
    assert len(found) == min(keep, sum(r is not None for r in rewards))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0], [0.865875, 0.865875, -0.865875, -0.865875]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [1.4997, -0.4999, -0.4999, -0.4999]),
        ([1] * 8, [0] * 4),
    ],
)
def test_pods_takes_mean_and_deviation_of_the_rollouts_kept(rewards, expected):
    pipeline, _ = halves("pods", num_generations=8, num_kept=4)
    found = advantages_of(pipeline, [group_of(rewards)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_keeping_all_makes_pods_grpo_to_the_last_bit():
    groups = random_groups(0, num_groups=3, num_generations=4)
    ours = rows_of(halves("pods", num_generations=4, num_kept=4)[0], groups)
    theirs = rows_of(halves("grpo", num_generations=4)[0], groups)
    for row, other in zip(ours, theirs, strict=True):
        for stream in ("tokens", "advantages", "weights", "behaviour_log_probs"):
            np.testing.assert_array_equal(getattr(row, stream), getattr(other, stream))
        assert row.index == other.index


@pytest.mark.parametrize("name", ["pods", "gfpo"])
def test_more_cannot_be_kept_than_is_sampled(name):
    config = ALGORITHMS[name].config
    with pytest.raises(ValidationError, match=r"num_kept is 9.*lower num_kept"):
        config(num_generations=8, num_kept=9)
    assert config(num_generations=8).keep == {"pods": 2, "gfpo": 4}[name]
    assert config().keep == {"pods": 16, "gfpo": 8}[name]


@pytest.mark.parametrize(
    ("keep_by", "keep", "ddof", "expected"),
    [
        ("length", 4, 0, [-1, 1, 0, -1, 1, 0]),
        ("length", 4, 1, [-0.866025, 0.866025, 0, -0.866025, 0.866025, 0]),
        ("token_efficiency", 4, 0, [-1.732051, 0.57735, 0.57735, 0, 0.57735, 0]),
        ("token_efficiency", 3, 0, [0, 0, 0, 0, 0, 0]),  # all right: nothing to learn
    ],
)
def test_gfpo_advantages_are_those_worked_by_hand(keep_by, keep, ddof, expected):
    pipeline, _ = halves(
        "gfpo", num_generations=6, num_kept=keep, keep_by=keep_by, std_ddof=ddof, std_eps=0
    )
    found = advantages_of(pipeline, [group_of(REWARDS, LENGTHS)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_most_efficient_answers_are_those_with_most_reward_per_token():
    rewards, numbers = np.array(REWARDS, np.float64), np.array(LENGTHS, np.float64)
    # 0.01, 0.0017 and 0.005 per token at places 1, 2 and 4
    assert subsets.most_rewarded_per_token(rewards, numbers, 2) == (1, 4)
    assert subsets.shortest(rewards, numbers, 2) == (0, 3)


@pytest.mark.parametrize(("normalizer", "loss"), [("all", -0.133333), ("kept", -0.5)])
def test_gfpo_divides_by_the_tokens_of_all_answers_or_of_those_kept(normalizer, loss):
    pipeline, objective = halves(
        "gfpo", num_generations=6, num_kept=4, std_eps=0, normalizer=normalizer
    )
    rows = rows_of(pipeline, [group_of(REWARDS, LENGTHS)])
    size = sum(len(row.tokens) for row in rows)
    assert size == {"all": 1500, "kept": 400}[normalizer]
    now = torch.full((size,), -1.0, dtype=torch.float64, requires_grad=True)
    inputs = loss_inputs(rows, log_probs=now, proximal=np.full(size, -1.0))
    assert loss_and_gradient(objective, inputs)[0] == pytest.approx(loss, abs=1e-6)


def test_keeping_all_makes_gfpo_grpo_with_a_token_mean():
    settings = {"num_generations": 4, "num_kept": 4, "std_ddof": 1}
    groups = random_groups(0, num_groups=3, num_generations=4)
    grpo = rows_of(halves("grpo", num_generations=4)[0], groups)
    weights = 1 / sum(len(row.tokens) for row in grpo)
    for normalizer in ("all", "kept"):
        ours = rows_of(halves("gfpo", normalizer=normalizer, **settings)[0], groups)
        for row, other in zip(ours, grpo, strict=True):
            np.testing.assert_array_equal(row.advantages, other.advantages)
            assert row.weights == pytest.approx(weights)


# quartiles 0.35, 0.6, 0.825
KNOWN = MeanRewards(means=(0.1, 0.35, 0.6, 0.825, 0.9))


@pytest.mark.parametrize(("mean", "kept"), [(0.1, 8), (0.45, 8), (0.7, 6), (0.95, 4)])
def test_fewer_rollouts_are_kept_of_easier_prompts(mean, kept):
    assert np.quantile(KNOWN.means, [0.25, 0.5, 0.75]).tolist() == [0.35, 0.6, 0.825]
    rewards = np.array([mean - 0.05, mean + 0.05, np.nan])
    assert by_difficulty(rewards, KNOWN, keep=8, warmup=5) == kept
    assert by_difficulty(rewards, KNOWN, keep=8, warmup=6) == 8
    assert by_difficulty(rewards, KNOWN, keep=2, warmup=1) == 2


def test_a_prompt_at_a_quartile_counts_as_the_easier_one():
    found = [by_difficulty(np.array([mean]), KNOWN, keep=8, warmup=5) for mean in (0.6, 0.825)]
    assert found == [6, 4]


def test_what_is_easy_is_learned_from_the_groups_trained_on():
    pipeline, _ = halves("gfpo", num_generations=4, num_kept=4, adaptive=True, adaptive_warmup=3)
    easy, hard = group_of([1, 1, 1, 0], [4, 3, 2, 1]), group_of([0, 0, 0, 1], [4, 3, 2, 1])
    state = pipeline.initial_state
    before = advantages_of(pipeline, [easy, hard], state)
    assert np.count_nonzero(before) == 8
    for group in (easy, hard, group_of([None, None]), hard):
        values = [[np.nan if v is None else v] for v in group.outcomes("answer")]
        rewarded = RewardedGroup(group=group, components=np.array(values))
        state = pipeline.adapt(state, [rewarded], StepReport(metrics={}, timings_s={}))
    assert state.means == (0.75, 0.25, 0.25)
    assert decoded_state(pipeline.initial_state, encoded_state(state)) == state
    after = advantages_of(pipeline, [easy, hard], state).reshape(2, 4)
    # median 0.25, upper quartile 0.5: the easy group keeps two of four, the hard one three
    assert [np.count_nonzero(row) for row in after] == [2, 3]


def test_difficulty_is_not_judged_by_the_rollouts_kept():
    with pytest.raises(ValidationError, match="set normalizer: all"):
        ALGORITHMS["gfpo"].config(adaptive=True, normalizer="kept")


def test_only_so_many_groups_are_remembered():
    state = MeanRewards(means=tuple(range(1000)))
    group = group_of([1, 0])
    rewarded = RewardedGroup(group=group, components=np.array([[1.0], [0.0]]))
    found = remember_means(state, [rewarded], StepReport(metrics={}, timings_s={}))
    assert found.means == (*range(1, 1000), 0.5)


@pytest.mark.parametrize("choose", [subsets.shortest, subsets.most_rewarded_per_token])
def test_an_answer_without_a_reward_is_never_chosen(choose):
    values = np.array([np.nan, 1.0, np.nan, 0.0])
    assert choose(values, np.array([1.0, 5, 2, 9]), 3) == (1, 3)
    assert choose(np.full(2, np.nan), np.ones(2), 2) == ()


def test_a_group_that_nobody_judged_is_dropped():
    (keep,) = halves("pods")[0].select
    outcome = keep(group_of([None, None]), None)
    assert isinstance(outcome, Dropped)
    assert outcome.reason == "no_rollout_kept"


PLAIN = {"ddof": 1, "eps": 0.0}


@pytest.mark.parametrize(
    ("pairs", "grpo", "gdpo"),
    [
        ([(0, 0), (0, 1)], 0.707107, 0.707107),
        ([(0, 0), (1, 1)], 0.707107, 1.414214),
        ([(0, 0), (0, 2)], 0.707107, 0.707107),
        ([(0, 1), (1, 0)], 0.0, 0.0),
    ],
)
def test_decoupling_keeps_combinations_apart_that_their_sum_confuses(pairs, grpo, gdpo):
    found = decoupled_values(np.array(pairs, np.float64), weights=(1.0, 1.0), **PLAIN)
    np.testing.assert_allclose(found, [-gdpo, gdpo], atol=1e-6)
    pair = group_of([p[0] for p in pairs], style=[p[1] for p in pairs])
    pipeline, _ = halves("grpo", outcomes={"answer": 1.0, "style": 1.0}, std_eps=0)
    np.testing.assert_allclose(advantages_of(pipeline, [pair]), [-grpo, grpo], atol=1e-6)


def two_prompts(lengths=((2, 2, 2, 2), (2, 2, 2, 2))):
    return [
        group_of([1, 0, 1, 0], lengths[0], style=[0, 0, 1, 1]),
        group_of([1, 1, 1, 1], lengths[1], group=1, style=[1, 1, 0, 1]),
    ]


SUMS = [0.433013, -1.299038, 1.299038, -0.433013, 0.25, 0.25, -0.75, 0.25]
WEIGHTED = {"answer": 1.0, "style": 0.5}


def test_gdpo_advantages_are_those_worked_by_hand():
    groups = two_prompts()
    components = [np.stack([g.outcomes("answer"), g.outcomes("style")], 1) for g in groups]
    sums = [
        decoupled_values(c * [1.0, 0.5], weights=(1.0, 0.5), **PLAIN)
        for c in np.array(components, np.float64)
    ]
    np.testing.assert_allclose(np.concatenate(sums), SUMS, atol=1e-6)
    pipeline, _ = halves("gdpo", outcomes=WEIGHTED, std_eps=0)
    np.testing.assert_allclose(
        advantages_of(pipeline, groups),
        [0.540062, -1.620185, 1.620185, -0.540062, 0.311805, 0.311805, -0.935414, 0.311805],
        atol=1e-6,
    )


def test_gdpo_over_tokens_is_the_one_worked_by_hand():
    groups = two_prompts([[3, 1, 2, 1], [1, 1, 4, 1]])
    pipeline, _ = halves("gdpo", outcomes=WEIGHTED, std_eps=0, batch_norm="tokens")
    np.testing.assert_allclose(
        advantages_of(pipeline, groups),
        [0.551190, -1.623107, 1.638339, -0.535958, 0.321449, 0.321449, -0.933882, 0.321449],
        atol=1e-5,
    )


def test_one_reward_makes_gdpo_grpo_up_to_a_positive_factor():
    groups = random_groups(1, num_groups=3, num_generations=4)
    ours = advantages_of(halves("gdpo", std_eps=0)[0], groups)
    theirs = advantages_of(halves("grpo", std_eps=0)[0], groups)
    ratios = ours / theirs
    assert ratios[0] > 0
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


def test_a_reward_that_is_equal_in_its_group_adds_exactly_nothing_to_gdpo():
    components = np.array([[1.0, 0.1 + 0.2], [0.0, 0.3]])
    alone = decoupled_values(components[:, :1], weights=(1.0,), **PLAIN)
    np.testing.assert_array_equal(decoupled_values(components, weights=(1.0, 5.0), **PLAIN), alone)


def test_the_weight_of_a_reward_acts_after_it_is_standardised():
    column = np.array([[1.0], [0.0], [0.5]])
    plain = decoupled_values(column, weights=(1.0,), ddof=1, eps=0.1)
    weighted = decoupled_values(0.01 * column, weights=(0.01,), ddof=1, eps=0.1)
    np.testing.assert_allclose(weighted, 0.01 * plain)
    turned = decoupled_values(-2 * column, weights=(-2.0,), ddof=1, eps=0.1)
    np.testing.assert_allclose(turned, -2 * plain)


def test_a_missing_reward_counts_for_nothing_in_gdpo():
    group = group_of([1, 0, None, 1], style=[None, 1, None, 0])
    pipeline, _ = halves("gdpo", outcomes=WEIGHTED)
    found = advantages_of(pipeline, [group])
    assert found[2] == 0
    assert np.isfinite(found).all()
    assert found[0] > found[1]


def test_a_condition_zeroes_a_reward_where_another_is_too_low():
    group = group_of([1, 1, 0, 1], other=[0.2, 1, 1, 0])
    term = partial(
        rewards.conditioned_outcome, scorer="answer", weight=1.0, on="other", at_least=1.0
    )
    assert term(group, None).tolist() == [0, 1, 0, 0]
    missing = group_of([None, None, 1], other=[1, 0, None])
    assert np.isnan(term(missing, None)).tolist() == [True, True, False]
    condition = {"scorer": "answer", "on": "other", "at_least": 1.0}
    pipeline, _ = halves("gdpo", outcomes={"answer": 2.0, "other": 1.0}, conditions=[condition])
    assert [reward(group, None).tolist() for reward in pipeline.rewards] == [
        [0, 2, 0, 0],
        [0.2, 1, 1, 0],
    ]
    with pytest.raises(ValueError, match="names the scorer 'other'"):
        halves("gdpo", conditions=[condition])


# unlikeliness: outcomes and mean log-probabilities of the worked group
RIGHT = [1, 0, 1, 1]
MEANS = [-0.2, -0.5, -0.9, -0.4]


def unlikely(right=RIGHT, means=MEANS):
    rollouts = [
        rollout(i, n, log_probs=[mean] * n)
        for i, (n, mean) in enumerate(zip([3, 1, 2, 5], means, strict=True))
    ]
    return scored(rollouts, answer=list(right))


@pytest.mark.parametrize(
    ("form", "shaped", "advantages"),
    [
        ("paper", [0.75, 0, 0.9375, 0.8125], [0.294883, -1.474416, 0.737208, 0.442325]),
        ("code", [0.8125, 0, 1, 0.875], [0.309304, -1.477785, 0.721709, 0.446772]),
    ],
)
def test_likely_right_answers_earn_less(form, shaped, advantages):
    pipeline, _ = halves("unlikeliness", form=form)
    rewards = sum(reward(unlikely(), None) for reward in pipeline.rewards)
    np.testing.assert_allclose(rewards, shaped, atol=1e-6)
    np.testing.assert_allclose(advantages_of(pipeline, [unlikely()]), advantages, atol=1e-5)


def test_the_discount_alone_does_not_keep_a_group():
    pipeline, _ = halves("unlikeliness")
    (keep,) = pipeline.select
    everyone = unlikely([1, 1, 1, 1])
    shaped = sum(reward(everyone, None) for reward in pipeline.rewards)
    np.testing.assert_allclose(shaped, [0.8125, 0.9375, 1, 0.875], atol=1e-6)
    for group in (everyone, unlikely([0, 0, 0, 0])):
        assert isinstance(keep(group, None), Dropped)
    assert keep(unlikely(), None) is not None


def test_answers_that_are_equally_likely_are_discounted_equally():
    found = rewards.discount_of_the_likely(
        unlikely([1, 1, 1, 1], [-0.5] * 4),
        None,
        weights={"answer": 1.0},
        coefficient=0.25,
        from_rank=0,
    )
    # ranks 0 to 3 are shared: 1.5 each
    np.testing.assert_allclose(found, -0.25 * 1.5 / 4)


def test_without_its_discount_unlikeliness_is_grpo_on_mixed_groups_to_the_last_bit():
    settings = {"rank_coef": 0.0, "std_eps": 1e-4}
    ours = advantages_of(halves("unlikeliness", **settings)[0], [unlikely()])
    np.testing.assert_array_equal(ours, advantages_of(halves("grpo")[0], [unlikely()]))
    assert differing_points(
        points("unlikeliness", num_generations=8, beta=0, **settings), points("grpo")
    ) == {"select", "rewards"}


def test_an_answer_that_one_of_two_scorers_judged_keeps_that_part():
    components = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 0.0], [np.nan, np.nan]])
    found = decoupled_values(components, weights=(1.0, 2.0), **PLAIN)
    root = 0.5**0.5  # of two answers, one deviation apart from the mean of both
    np.testing.assert_allclose(found, [root, -root + 2 * root, -2 * root, np.nan])
