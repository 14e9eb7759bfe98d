"""From groups to weighted rows: updates, masks, metrics, and the loss of the toy batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.algorithms import ALGORITHMS, dapo, dr_grpo, grpo
from grpo.batch import build_batch, plain_rows, rows_of_groups, workings
from grpo.errors import NonFinite
from grpo.objective import loss_and_metrics
from grpo.scaled_penalties import scaled_penalty_sums, with_scales
from tests.unit.family_cases import with_measures
from tests.unit.grpo_groups import (
    NEW,
    OLD,
    REFERENCE,
    flat,
    loss_inputs,
    random_groups,
    rollout,
    scored,
    toy_group,
)


def built(pipeline, groups, *, num_updates=1):
    state = pipeline.initial_state
    return build_batch(pipeline, groups, state, step=3, version=2, num_updates=num_updates)


def pipeline_of(algorithm=grpo, *, length=4, **settings):
    config = algorithm.Config(**settings)
    return algorithm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=length)


def toy_loss(algorithm, **settings):
    (rows,) = built(pipeline_of(algorithm, **settings), [toy_group()]).batch.updates
    log_probs = torch.tensor(flat(NEW))
    inputs = loss_inputs(rows, log_probs=log_probs, proximal=flat(OLD), reference=flat(REFERENCE))
    objective = algorithm.objective(algorithm.Config(**settings))
    return loss_and_metrics(objective, inputs)[0].item()


POPULATION = {"std_ddof": 0, "std_eps": 0.0, "importance_cap": None}


@pytest.mark.parametrize(
    ("algorithm", "settings", "loss"),
    [
        (grpo, POPULATION, 0.058749),
        (dapo, POPULATION | {"soft_overlong_cache": 0}, 0.266724),
        # advantages are +-1/2 instead of +-1, and the loss is linear in them
        (dr_grpo, {"importance_cap": None}, 0.166702 / 2),
    ],
)
def test_the_loss_of_the_toy_batch_is_the_one_worked_by_hand(algorithm, settings, loss):
    assert toy_loss(algorithm, **settings) == pytest.approx(loss, abs=1e-6)


def test_the_kl_penalty_is_added_with_the_weights_of_the_mean():
    # token mean of k3 over the toy batch: 0.0216028
    plain = toy_loss(dapo, soft_overlong_cache=0)
    assert toy_loss(dapo, soft_overlong_cache=0, beta=0.5) - plain == pytest.approx(
        0.5 * 0.0216028, abs=1e-7
    )


def test_importance_correction_multiplies_each_tokens_loss():
    # weights 2, 0.67032, 1.491825 on tokens 1, 7, 9 whose losses are -0.740818, 0.8, -1; divided
    # by 10 tokens that adds (-0.740818 + 0.8 * -0.32968 - 0.491825) / 10
    settings = POPULATION | {"soft_overlong_cache": 0, "importance_cap": 2.0}
    expected = 0.266724 + (-0.740818 - 0.263744 - 0.491825) / 10
    assert toy_loss(dapo, **settings) == pytest.approx(expected, abs=1e-6)


# With which a member trains answers to the plain prompt.
AS_INDEPENDENT = {"igrpo": {"num_drafts": 0}}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_does_not_depend_on_how_rows_are_split_over_micro_batches(name):
    algorithm = ALGORITHMS[name]
    settings = AS_INDEPENDENT[name] if name in AS_INDEPENDENT else {}
    config = algorithm.config(beta=0.1, entropy_coef=0.01, num_generations=4, **settings)
    pipeline = algorithm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=200)
    groups = random_groups(0, num_groups=5, num_generations=8)
    (rows,) = built(pipeline, [with_measures(pipeline, group) for group in groups]).batch.updates
    rng = np.random.default_rng(1)
    streams = [-rng.random((4, len(row.tokens))) for row in rows]

    def inputs_of(part):
        now, old, ref, ent = np.concatenate([streams[i] for i in part], axis=1)
        return loss_inputs(
            [rows[i] for i in part],
            log_probs=torch.tensor(now, requires_grad=True),
            proximal=old,
            reference=ref,
            entropy=torch.tensor(-ent),
        )

    objective = algorithm.objective(config)
    sums = [scaled_penalty_sums(objective, inputs_of([i])) for i in range(len(rows))]
    objective = with_scales(objective, sums)

    def gradient(parts):
        total, slopes = 0.0, []
        for part in parts:
            inputs = inputs_of(part)
            loss, _ = loss_and_metrics(objective, inputs)
            slopes.append(torch.autograd.grad(loss, inputs.log_probs)[0].numpy())
            total += loss.item()
        return total, np.concatenate(slopes)

    whole, whole_gradient = gradient([range(len(rows))])
    if pipeline.stage is not None and not any(row.weights.any() for row in rows):
        assert not whole_gradient.any()  # it learns in its stage alone
        return
    assert np.abs(whole_gradient).max() > 0
    for cuts in ([3], [1, 2, 11], list(range(1, len(rows)))):
        parts = np.split(np.arange(len(rows)), cuts)
        total, slopes = gradient([part.tolist() for part in parts])
        assert total == pytest.approx(whole, abs=1e-12)
        np.testing.assert_allclose(slopes, whole_gradient, atol=1e-14)


def test_updates_are_made_of_whole_groups_in_order_and_differ_by_one_group_at_most():
    groups = random_groups(0, num_groups=5, num_generations=3)
    batch = built(pipeline_of(), groups, num_updates=2).batch
    assert (batch.step, batch.version) == (3, 2)
    assert [[row.group for row in rows] for rows in batch.updates] == [
        [0, 0, 0, 1, 1, 1],
        [2, 2, 2, 3, 3, 3, 4, 4, 4],
    ]


@pytest.mark.parametrize("num_updates", [1, 2, 3, 6])
def test_the_coefficients_of_every_update_sum_to_one_alone(num_updates):
    groups = random_groups(1, num_groups=6, num_generations=4)
    for algorithm in (grpo, dapo):
        pipeline = replace(pipeline_of(algorithm), trained=())
        for rows in built(pipeline, groups, num_updates=num_updates).batch.updates:
            assert flat([row.weights for row in rows]).sum() == pytest.approx(1.0, abs=1e-6)


def test_advantages_do_not_depend_on_the_number_of_updates():
    groups = random_groups(2, num_groups=4, num_generations=4)
    one, four = (built(pipeline_of(), groups, num_updates=n).batch for n in (1, 4))
    left = [row.advantages.tolist() for rows in one.updates for row in rows]
    right = [row.advantages.tolist() for rows in four.updates for row in rows]
    assert left == right


def test_more_updates_than_groups_are_refused():
    groups = random_groups(0, num_groups=2, num_generations=2)
    with pytest.raises(ValueError, match="2 groups into 3 updates"):
        built(pipeline_of(), groups, num_updates=3)


def test_given_tokens_and_cut_off_answers_are_not_trained_but_count_in_the_statistics():
    rollouts = [rollout(0, 3, guidance=1), rollout(1, 4, truncated=True)]
    group = scored(rollouts, answer=[1.0, 0.0])
    pipeline = pipeline_of(dapo, soft_overlong_cache=0, std_eps=0.0)
    result = built(pipeline, [group])
    (first,) = result.batch.updates[0]  # a row that nothing weighs costs the learner nothing
    assert first.index == 0
    assert first.weights.tolist() == [0.0, 0.5, 0.5]
    assert first.advantages.tolist() == pytest.approx([0.707107] * 3, abs=1e-6)
    assert result.metrics["frac_rows_trained"] == 0.5
    assert result.metrics["completions/clipped_ratio"] == 0.5


def test_token_weights_are_multiplied_and_leave_the_mean_alone():
    def double(group, state):
        return [np.full(item.num_tokens, 2.0) for item in group.rollouts]

    def ramp(group, state):
        return [np.arange(item.num_tokens, dtype=np.float64) for item in group.rollouts]

    plain = built(pipeline_of(), [toy_group()]).batch.updates[0]
    weighted = built(replace(pipeline_of(), token_weight=(double, ramp)), [toy_group()])
    for before, after in zip(plain, weighted.batch.updates[0], strict=True):
        assert before.policy_weights.tolist() == [1.0] * len(before.tokens)
        assert after.policy_weights.tolist() == [2.0 * t for t in range(len(after.tokens))]
        assert after.weights.tolist() == before.weights.tolist()


def test_an_infinite_reward_stops_the_step_and_names_the_group():
    group = scored([rollout(0, 1), rollout(1, 1)], group=7, answer=[1.0, float("inf")])
    with pytest.raises(NonFinite, match="group 7"):
        built(pipeline_of(), [group])


def test_an_unscorable_rollout_has_advantage_zero_and_no_share_in_the_mean_reward():
    group = scored([rollout(i, 2) for i in range(3)], answer=[1.0, None, 0.0])
    result = built(pipeline_of(std_eps=0.0), [group])
    assert result.advantages[0].tolist() == pytest.approx([0.707107, 0.0, -0.707107], abs=1e-6)
    assert result.metrics["reward"] == 0.5
    assert result.metrics["frac_reward_missing"] == pytest.approx(1 / 3)


def test_metrics_are_those_worked_by_hand():
    # rewards 1 * answer + 0.5 * style: (1.5, 0) and (1, 1)
    mixed = scored([rollout(0, 2), rollout(1, 4)], answer=[1.0, 0.0], style=[1.0, 0.0])
    equal = scored([rollout(0, 3), rollout(1, 3)], group=1, answer=[1.0, 1.0], style=[0.0, 0.0])
    pipeline = grpo.pipeline(
        grpo.Config(), outcomes={"answer": 1.0, "style": 0.5}, max_completion_length=9
    )
    metrics = built(pipeline, [mixed, equal]).metrics
    assert metrics == pytest.approx(
        {
            "reward": 3.5 / 4,
            "rewards/answer/mean": 0.75,
            "rewards/style/mean": 0.25,  # as the scorer said it, without its weight
            "reward_std": 1.5 / np.sqrt(2) / 2,  # (1.5 / sqrt(2) + 0) / 2
            "frac_reward_zero_std": 0.5,
            "frac_reward_missing": 0.0,
            "completions/mean_length": 3.0,
            "completions/min_length": 2.0,
            "completions/max_length": 4.0,
            "completions/clipped_ratio": 0.0,
            "num_tokens": 12.0 + 4 * 2,
            "frac_rows_trained": 1.0,
        }
    )


def test_a_shaped_term_is_reported_under_its_functions_name():
    group = scored([rollout(0, 90), rollout(1, 100)], answer=[1.0, 0.0])
    pipeline = pipeline_of(dapo, length=100, soft_overlong_cache=20)
    metrics = built(pipeline, [group]).metrics
    assert metrics["rewards/soft_overlong/mean"] == -0.75
    assert metrics["rewards/answer/mean"] == 0.5
    assert metrics["reward"] == -0.25


def test_a_mean_of_nothing_is_absent_instead_of_zero():
    group = scored([rollout(0, 1), rollout(1, 1)], answer=[None, None])
    metrics = built(pipeline_of(), [group]).metrics
    assert "reward" not in metrics
    assert "rewards/answer/mean" not in metrics
    assert metrics["frac_reward_missing"] == 1.0


def test_an_empty_completion_takes_part_in_means_and_statistics_and_has_no_row():
    group = scored([rollout(0, 0), rollout(1, 2)], answer=[0.0, 1.0])
    result = built(pipeline_of(std_eps=0.0), [group])
    ((row,),) = result.batch.updates
    assert row.weights.tolist() == [0.25, 0.25]
    assert row.advantages.tolist() == pytest.approx([0.707107] * 2, abs=1e-6)
    assert len(rows_of_groups(workings(pipeline_of(), [group], None, num_updates=1))[0]) == 2


def test_an_update_keeps_a_row_even_if_nothing_weighs_any():
    """The learner takes a step of zero gradient, as before the row was left out."""
    cut = [rollout(i, 2, truncated=True) for i in range(3)]
    groups = [scored(cut, answer=[1.0, 0.0, 0.0]), scored(cut, group=1, answer=[0.0, 0.0, 1.0])]
    pipeline = pipeline_of(dapo, soft_overlong_cache=0)
    updates = built(pipeline, groups, num_updates=2).batch.updates
    assert [[(row.group, row.index) for row in rows] for rows in updates] == [[(0, 0)], [(1, 0)]]
    assert not any(row.weights.any() for rows in updates for row in rows)


def test_epochs_repeat_the_updates_in_order():
    groups = random_groups(2, num_groups=4, num_generations=4)
    one = built(pipeline_of(), groups, num_updates=2).batch.updates
    state = None
    again = build_batch(
        pipeline_of(), groups, state, step=3, version=2, num_updates=2, num_epochs=3
    ).batch.updates
    assert [[row.group for row in rows] for rows in again] == [
        [row.group for row in rows] for rows in one
    ] * 3
    assert again[0] is again[2] is again[4]  # the very rows: no copies travel


def test_workings_multiply_to_what_the_learner_gets():
    def halved(group, state):
        return [np.full(item.num_tokens, 0.5) for item in group.rollouts]

    groups = random_groups(3, num_groups=3, num_generations=4)
    pipeline = replace(pipeline_of(), loss_weight=(halved,))
    found = workings(pipeline, groups, None, num_updates=3)
    assert [part.indices(3)[:2] for part in found.parts] == [(0, 1), (1, 2), (2, 3)]
    rows = [row for rows in built(pipeline, groups, num_updates=3).batch.updates for row in rows]
    means = [mean for group in found.means for mean in group]
    advantages = [value for group in found.advantages for value in group]
    for row, mean, advantage in zip(rows, means, advantages, strict=True):
        np.testing.assert_array_equal(row.weights, (mean * 0.5).astype(np.float32))
        np.testing.assert_array_equal(row.advantages, advantage.astype(np.float32))
    assert sum(mean.sum() for mean in found.means[0]) == pytest.approx(1.0)


def test_plain_rows_are_those_that_training_sees_with_weight_one():
    hinted = replace(rollout(0, 3, guidance=1), train_context=np.arange(5, dtype=np.int32))
    first, second = plain_rows(scored([hinted, rollout(1, 2)], answer=[1.0, 0.0]))
    assert len(first.context) == 5
    assert first.is_cross_context
    assert not second.is_cross_context
    assert first.weights.tolist() == [1.0] * 3
    assert first.advantages.tolist() == [0.0] * 3
