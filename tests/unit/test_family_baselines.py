"""Members that change the advantage or train on accepted answers: numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo.types import Dropped
from tests.unit.family_cases import (
    advantages_of,
    differing_points,
    halves,
    loss_and_gradient,
    points,
    rows_of,
)
from tests.unit.grpo_groups import (
    LENGTHS,
    NEW,
    OLD,
    flat,
    loss_inputs,
    rollout,
    scored,
    toy_group,
)

WHITENED = ("reinforce_pp", "reinforce_pp_baseline")


def group_of(rewards, lengths=None, *, group=0):
    numbers = [2] * len(rewards) if lengths is None else lengths
    return scored([rollout(i, n) for i, n in enumerate(numbers)], group=group, answer=rewards)


def toy_loss(name, *, places=(0, 1, 2, 3), **settings):
    """Loss of the toy batch; `places` are those of the answers that are trained on."""
    pipeline, objective = halves(name, importance_cap=None, **settings)
    rows = rows_of(pipeline, [toy_group()])
    assert [len(row.tokens) for row in rows] == [LENGTHS[place] for place in places]
    now = torch.tensor(flat([NEW[place] for place in places]), requires_grad=True)
    inputs = loss_inputs(rows, log_probs=now, proximal=flat([OLD[place] for place in places]))
    return loss_and_gradient(objective, inputs)


@pytest.mark.parametrize("name", WHITENED)
def test_whitened_advantages_of_the_toy_batch_are_those_worked_by_hand(name):
    # 4 of 10 tokens carry reward 1: mean 0.4, sample deviation 0.516398
    pipeline, _ = halves(name)
    expected = [1.161895, -0.774597, -0.774597, 1.161895]
    np.testing.assert_allclose(advantages_of(pipeline, [toy_group()]), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reinforce_pp", [0.408248, -2.041241, 0.408248, 0.408248]),
        ("reinforce_pp_baseline", [1.107019, -1.549826, -0.221404, -0.221404]),
    ],
)
def test_whitening_counts_the_tokens_of_all_groups(name, expected):
    groups = [group_of([1, 0], [2, 1]), group_of([1, 1], [1, 2], group=1)]
    pipeline, _ = halves(name)
    np.testing.assert_allclose(advantages_of(pipeline, groups), expected, atol=1e-6)


@pytest.mark.parametrize("name", WHITENED)
def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens(name):
    groups = [group_of([1, 0.3, 0], [2, 5, 1]), group_of([0.5, 1, 0], [1, 2, 9], group=1)]
    rows = rows_of(halves(name)[0], groups)
    values = flat([row.advantages for row in rows])
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_a_discount_leaves_less_of_the_reward_to_early_tokens():
    pipeline, _ = halves("reinforce_pp", gamma=0.5)
    rows = rows_of(pipeline, [group_of([1, 0], [3, 1])])
    # returns 0.25, 0.5, 1 and 0: mean 0.4375, sample deviation 0.426956
    expected = (np.array([0.25, 0.5, 1, 0]) - 0.4375) / 0.426956
    np.testing.assert_allclose(flat([r.advantages for r in rows]), expected, atol=1e-5)


def test_guidance_tokens_are_in_no_whitening():
    guided = scored([rollout(0, 3, guidance=2), rollout(1, 1)], answer=[1, 0])
    rows = rows_of(halves("reinforce_pp")[0], [guided])
    # the policy wrote one token of each: 1 and 0, mean 0.5, sample deviation 0.707107
    assert rows[0].advantages == pytest.approx([0, 0, 0.707107], abs=1e-5)
    assert rows[1].advantages == pytest.approx([-0.707107], abs=1e-5)


def test_without_a_group_baseline_one_answer_per_prompt_is_enough():
    groups = [group_of([1]), group_of([0], group=1)]
    found = advantages_of(halves("reinforce_pp", num_generations=1)[0], groups)
    np.testing.assert_allclose(found, [0.866025, -0.866025], atol=1e-5)


@pytest.mark.parametrize("rewards", [[1.0], [None, 0.4], [0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2, 0.3]])
def test_a_step_without_a_difference_is_not_whitened(rewards):
    found = advantages_of(halves("reinforce_pp")[0], [group_of(rewards, [1] * len(rewards))])
    assert found.tolist() == [0.0] * len(rewards)


def test_with_equal_lengths_and_one_group_whitening_is_standardizing():
    rewards = [1, 0.5, 0, 0.2]
    found = advantages_of(halves("reinforce_pp")[0], [group_of(rewards, [1] * 4)])
    grpo = advantages_of(halves("grpo", std_eps=0)[0], [group_of(rewards, [1] * 4)])
    np.testing.assert_allclose(found, grpo, atol=1e-6)


def test_the_two_whitenings_differ_in_the_baseline_alone():
    assert differing_points(points(WHITENED[0]), points(WHITENED[1])) == {"advantage"}


def test_gpg_scales_up_for_groups_that_teach_nothing():
    groups = [
        group_of(rewards, group=i)
        for i, rewards in enumerate([[1, 0, 0, 1], [1] * 4, [0] * 4, [1, 0, 0, 0]])
    ]
    found = advantages_of(halves("gpg")[0], groups).reshape(4, 4)
    # alpha = 4 / (4 - 2)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1])
    np.testing.assert_allclose(found[3], [1.5, -0.5, -0.5, -0.5])
    assert not found[1:3].any()
    # a useful step of its own needs no scale: Dr. GRPO's advantages
    np.testing.assert_array_equal(
        advantages_of(halves("gpg")[0], groups[:1]), advantages_of(halves("dr_grpo")[0], groups[:1])
    )


def test_a_step_that_teaches_nothing_has_gpg_advantages_of_zero():
    assert not advantages_of(halves("gpg")[0], [group_of([1, 1]), group_of([0, 0], group=1)]).any()


def test_the_gpg_loss_of_the_toy_batch_is_the_one_worked_by_hand():
    # alpha 1, A = 0.5, -0.5, -0.5, 0.5; mean over answers of the mean of -A lp:
    # (0.5 * 1.9 / 3 - 0.5 * 0.8 / 2 - 0.5 * 2.7 / 4 + 0.5 * 0.6) / 4
    loss, gradient = toy_loss("gpg")
    assert loss == pytest.approx((0.316667 - 0.2 - 0.3375 + 0.3) / 4, abs=1e-6)
    expected = np.repeat([-0.5 / 3, 0.5 / 2, 0.5 / 4, -0.5], LENGTHS) / 4
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_published_gpg_loss_as_a_token_mean_is_the_one_worked_by_hand():
    _, objective = halves("gpg", importance_cap=None)
    # alpha 2: A = 1, -1, -1, 1; -A lp sums to 1.9 + 0.6 - 0.8 - 2.7 over 10 tokens
    pipeline, _ = halves("gpg")
    rows = rows_of(pipeline, [toy_group(), group_of([1] * 4, group=1)])[:4]
    now = torch.tensor(flat(NEW), requires_grad=True)
    inputs = loss_inputs(rows, log_probs=now, proximal=flat(OLD))
    per_token = objective.surrogate(now, inputs).loss
    assert per_token.mean().item() == pytest.approx(-0.1, abs=1e-6)


@pytest.mark.parametrize("name", ["raft", "raft_pp"])
def test_only_answers_of_positive_reward_are_imitated(name):
    found = advantages_of(halves(name)[0], [group_of([1, -1, 0, None])])
    assert found.tolist() == [1, 0, 0, 0]
    assert advantages_of(halves(name)[0], [group_of([-1, -0.5])]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "normalizer", "loss"),
    [
        # answers 1 and 4: 0.4 + 1.3 + 0.2 + 0.6 = 2.5, over 10 tokens or over theirs
        ("raft", "all", 0.25),
        ("raft", "kept", 0.625),
        ("raft_pp", "all", -0.384599),
        ("raft_pp", "kept", -0.9614975),
    ],
)
def test_raft_losses_of_the_toy_batch_are_those_worked_by_hand(name, normalizer, loss):
    places = (0, 1, 2, 3) if normalizer == "all" else (0, 3)
    found, gradient = toy_loss(name, normalizer=normalizer, places=places)
    assert found == pytest.approx(loss, abs=1e-6)
    assert (gradient <= 0).all()  # nothing is made less likely


@pytest.mark.parametrize("name", ["raft", "raft_pp"])
def test_a_group_of_which_nothing_is_kept_is_dropped(name):
    (keep,) = halves(name, normalizer="kept")[0].select
    outcome = keep(group_of([0, -1, None, 0]), None)
    assert isinstance(outcome, Dropped)
    assert outcome.reason == "no_rollout_kept"


def test_reinforce_rej_loss_of_the_toy_batch_is_the_one_worked_by_hand():
    loss, _ = toy_loss("reinforce_rej")
    assert loss == pytest.approx(0.266724, abs=1e-6)


@pytest.mark.parametrize("rewards", [[1, 0, 0, 1], [1, -1, -1, 1], [0.7, -0.2, 0, 0.3]])
def test_reinforce_rej_knows_right_and_wrong_alone(rewards):
    found = advantages_of(halves("reinforce_rej")[0], [group_of(rewards)])
    assert found.tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize("rewards", [[0, 0], [1, 1], [-1, -1], [0.2, 0.9], [1, None], [None, None]])
def test_reinforce_rej_rejects_prompts_without_right_and_wrong(rewards):
    assert not advantages_of(halves("reinforce_rej")[0], [group_of(rewards)]).any()


@pytest.mark.parametrize("name", ["gpg", "reinforce_rej"])
def test_rejected_prompts_can_be_replaced_instead(name):
    assert differing_points(points(name, dynamic_sampling=True), points(name)) == {"select"}


@pytest.mark.parametrize("name", ["gpg", "raft"])
def test_a_log_likelihood_does_not_see_the_start_of_the_step(name):
    _, objective = halves(name, importance_cap=None)
    rows = rows_of(halves(name)[0], [toy_group()])
    now = torch.tensor(flat(NEW), requires_grad=True)
    results = [
        loss_and_gradient(objective, loss_inputs(rows, log_probs=now, proximal=proximal))
        for proximal in (flat(OLD), flat(NEW))
    ]
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_a_scorer_of_weight_zero_does_not_keep_a_group():
    settings = {"outcomes": {"answer": 1.0, "style": 0.0}, "dynamic_sampling": True}
    (keep,) = halves("gpg", **settings)[0].select
    same = scored([rollout(i, 2) for i in range(2)], answer=[1.0, 1.0], style=[0.0, 5.0])
    assert isinstance(keep(same, None), Dropped)
