"""What every member that samples independent answers and judges them whole has to satisfy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from grpo import advantage, plans, selection, spans
from grpo.algorithms import ALGORITHMS
from grpo.subsets import subset
from grpo.types import Group
from tests.unit.family_cases import halves, loss_and_gradient, row_inputs, rows_of
from tests.unit.grpo_groups import flat, loss_inputs, rollout, scored


def is_plain(pipeline) -> bool:
    """Whether its answers are independent, judged as a whole, and not chosen by how many are right:
    the groups below have outcomes of any level."""
    plan = pipeline.plan
    is_independent = isinstance(plan, partial) and plan.func is plans.independent
    by_level = selection.drop_unless_accuracy_within
    is_chosen = any(getattr(select, "func", None) is by_level for select in pipeline.select)
    return is_independent and not is_chosen and pipeline.spans is spans.whole_answer


PLAIN = [name for name in ALGORITHMS if is_plain(halves(name)[0])]


def distinct_groups(seed: int, *, num_groups: int = 3) -> list[Group]:
    """Four answers each whose lengths, rewards and likelihoods all differ; the first is right."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(num_groups):
        lengths = rng.permutation(9)[:4] + 1
        rewards = rng.permutation([1.0, 0.7, -0.2, -1.0])
        rollouts = [rollout(i, int(n), log_probs=-rng.random(n)) for i, n in enumerate(lengths)]
        groups.append(scored(rollouts, group=number, answer=rewards.tolist()))
    return groups


def without_kl_in_reward(name: str) -> dict[str, float]:
    """Settings under which equal outcomes are equal rewards."""
    return {"kl_in_reward": 0.0} if "kl_in_reward" in ALGORITHMS[name].config.model_fields else {}


def by_rollout(rows):
    """Each row's numbers by the tokens of the rollout that it came from."""
    return {
        (row.group, row.behaviour_log_probs.tobytes()): (
            row.weights,
            row.advantages,
            row.policy_weights,
        )
        for row in rows
    }


def test_most_members_are_plain():
    assert len(PLAIN) >= 15


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_a_groups_answers_changes_nothing(name):
    pipeline, _ = halves(name, num_generations=4)
    groups = distinct_groups(0)
    turned = [subset(group, (2, 0, 3, 1)) for group in groups]
    left = by_rollout(rows_of(pipeline, groups, pipeline.initial_state))
    right = by_rollout(rows_of(pipeline, turned, pipeline.initial_state))
    assert left.keys() == right.keys()
    for key, numbers in left.items():
        for ours, theirs in zip(numbers, right[key], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PLAIN)
def test_rows_are_numbered_by_their_place_in_the_group(name):
    pipeline, _ = halves(name, num_generations=4)
    for group in distinct_groups(1):
        rows = rows_of(pipeline, [group], pipeline.initial_state)
        assert [row.index for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "outcomes",
    [[0.0] * 4, [1.0] * 4, [-1.0] * 4, [None] * 4, [1.0, None, None, None], [0.1 * 3] * 4],
)
def test_a_group_that_tells_nothing_apart_is_dropped_or_teaches_nothing(name, outcomes):
    pipeline, objective = halves(name, num_generations=4, **without_kl_in_reward(name))
    group = scored([rollout(i, i + 1) for i in range(4)], answer=outcomes)
    for select in pipeline.select:
        outcome = select(group, pipeline.initial_state)
        if not isinstance(outcome, Group):
            assert outcome.reason in {"constant_outcome", "no_rollout_kept"}
            return
    rows = rows_of(pipeline, [group], pipeline.initial_state)
    loss, gradient = loss_and_gradient(
        replace(objective, penalties=()), row_inputs(objective, rows)
    )
    assert np.isfinite([loss, *gradient]).all()
    is_imitation = pipeline.advantage is advantage.accepted
    values = flat([row.advantages for row in rows])
    assert (values >= 0).all() if is_imitation else not values.any()
    assert is_imitation or not gradient.any()


@pytest.mark.parametrize("name", PLAIN)
def test_on_policy_a_step_follows_the_sign_of_the_advantage(name):
    pipeline, objective = halves(name, num_generations=4, beta=0)
    rows = rows_of(pipeline, distinct_groups(2), pipeline.initial_state)
    behaviour = flat([row.behaviour_log_probs for row in rows])
    inputs = loss_inputs(
        rows,
        log_probs=torch.tensor(behaviour, requires_grad=True),
        proximal=behaviour,
        reference=behaviour,
        entropy=torch.zeros(len(behaviour), dtype=torch.float64),
    )
    _, gradient = loss_and_gradient(replace(objective, penalties=()), inputs)
    weighed = inputs.advantages * inputs.policy_weights * inputs.weights
    np.testing.assert_array_equal(np.sign(-gradient), np.sign(weighed.numpy()))
    assert gradient.any()


@pytest.mark.parametrize("name", PLAIN)
def test_an_answer_that_nobody_judged_is_not_learned_from(name):
    pipeline, _ = halves(name, num_generations=4)
    group = scored([rollout(i, i + 2) for i in range(4)], answer=[1.0, None, -1.0, 0.5])
    lengths = {len(row.tokens): row for row in rows_of(pipeline, [group], pipeline.initial_state)}
    assert 3 not in lengths or not lengths[3].advantages.any()
    assert any(row.advantages.any() for row in lengths.values())


@pytest.mark.parametrize("name", PLAIN)
def test_a_group_of_one_is_refused_unless_no_answer_is_compared(name):
    config = ALGORITHMS[name].config
    if config.model_fields["num_generations"].metadata[0].ge == 1:
        pipeline, _ = halves(name, num_generations=1)
        groups = [scored([rollout(0, 2)], group=i, answer=[float(i)]) for i in range(2)]
        assert rows_of(pipeline, groups, pipeline.initial_state)[0].advantages.any()
    else:
        with pytest.raises(ValueError, match="num_generations"):
            config(num_generations=1)
