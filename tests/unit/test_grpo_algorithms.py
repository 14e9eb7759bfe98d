"""What every algorithm must have, and how the members of the family reduce to each other."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.algorithms import ALGORITHMS, dapo, dr_grpo, grpo
from grpo.batch import build_batch
from grpo.describe import call_text, described
from grpo.objective import Signal
from grpo.surrogates import clipped
from tests.unit.grpo_groups import random_groups, rollout, scored

ROOT = Path(__file__).parents[2]
NEUTRAL_DAPO = {
    "num_generations": 8,
    "epsilon_high": None,
    "dynamic_sampling": False,
    "mask_truncated_completions": False,
    "soft_overlong_cache": 0,
}


def halves(algorithm, *, outcomes=None, length=96, **settings):
    config = algorithm.Config(**settings)
    pipeline = algorithm.pipeline(
        config, outcomes=outcomes or {"answer": 1.0}, max_completion_length=length
    )
    return pipeline, algorithm.objective(config)


def points(algorithm, **settings):
    return dict(described(*halves(algorithm, **settings)))


def differing_points(left, right):
    return {point for point in left if left[point] != right[point]}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_what_a_member_of_the_family_needs(name):
    algorithm = ALGORITHMS[name]
    config = algorithm.config(beta=0.1, kl_estimator="k2", entropy_coef=0.01)
    assert algorithm.name == name
    assert algorithm.config.model_validate_json(config.model_dump_json()) == config
    pipeline = algorithm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=96)
    objective = algorithm.objective(config)
    assert objective.needs == {Signal.REFERENCE, Signal.ENTROPY}
    assert described(*pickle.loads(pickle.dumps((pipeline, objective)))) == described(
        pipeline, objective
    )
    texts = [line for _, lines in described(pipeline, objective) for line in lines]
    assert any(text.startswith("0.1 * k2: ") for text in texts)
    assert any(text.startswith("-0.01 * entropy: ") for text in texts)
    assert not any(" at 0x" in text or "lambda" in text or "<locals>" in text for text in texts)
    assert algorithm.paper in sys.modules[algorithm.config.__module__].__doc__


def test_the_documentation_has_one_row_for_each_algorithm_and_no_other():
    _, _, rest = (ROOT / "docs/algorithms.md").read_text().partition("## The members")
    members, _, _ = rest.partition("\n##")
    rows = re.findall(r"^\| `(\w+)` \|", members, re.MULTILINE)
    assert sorted(rows) == sorted(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_recipe_that_names_it(name):
    recipe = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert re.search(rf"\bname: {name}\b", recipe)


def test_importing_the_algorithms_loads_no_torch():
    code = "import sys, grpo.algorithms, grpo.batch, grpo.describe; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == b"False"


def test_a_partial_is_described_as_the_call_it_stands_for():
    assert (
        call_text(partial(clipped, low=0.2, high=0.28, delta=None)) == "clipped(low=0.2, high=0.28)"
    )
    assert (
        call_text(partial(clipped, low=partial(clipped, high=1))) == "clipped(low=clipped(high=1))"
    )
    assert call_text(clipped) == "clipped"


def test_dapo_with_its_parts_switched_off_differs_from_grpo_only_in_the_mean():
    assert differing_points(points(dapo, **NEUTRAL_DAPO), points(grpo)) == {"aggregation"}


def test_dapo_with_its_parts_switched_off_is_grpo_to_the_last_bit_on_equal_lengths():
    rng = np.random.default_rng(0)
    groups = [
        scored([rollout(i, 7) for i in range(8)], group=g, answer=list(rng.random(8)))
        for g in range(3)
    ]
    updates = [
        build_batch(pipeline, groups, None, step=0, version=0, num_updates=2).batch.updates
        for pipeline, _ in (halves(dapo, **NEUTRAL_DAPO), halves(grpo))
    ]
    for ours, theirs in zip(*updates, strict=True):
        for row, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(row.weights, other.weights)
            np.testing.assert_array_equal(row.advantages, other.advantages)


def test_dr_grpo_differs_from_grpo_in_the_advantage_and_the_mean_alone():
    assert differing_points(points(dr_grpo), points(grpo)) == {"advantage", "aggregation"}


def test_dr_grpo_divides_by_the_budget_and_not_by_the_answers_length():
    groups = random_groups(0, num_groups=2, num_generations=3)
    pipeline, _ = halves(dr_grpo, length=50)
    (rows,) = build_batch(pipeline, groups, None, step=0, version=0, num_updates=1).batch.updates
    assert {weight for row in rows for weight in row.weights.tolist()} == {
        float(np.float32(1 / (6 * 50)))
    }


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"epsilon_high": None}, {"surrogate"}),
        ({"dynamic_sampling": False}, {"select"}),
        ({"mask_truncated_completions": False}, {"trained"}),
        ({"soft_overlong_cache": 0}, {"rewards"}),
    ],
)
def test_each_part_of_dapo_is_one_switch_at_one_point(settings, changed):
    assert differing_points(points(dapo, **settings), points(dapo)) == changed


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"beta": 0.1}, {"penalties", "needs"}),
        ({"entropy_coef": 0.1}, {"penalties", "needs"}),
        ({"importance_cap": None}, {"gates"}),
        ({"delta": 4.0}, {"surrogate"}),
        ({"epsilon": 0.1}, {"surrogate"}),
        ({"num_generations": 4}, {"plan"}),
    ],
)
def test_a_shared_option_changes_one_thing(settings, changed):
    assert differing_points(points(grpo, **settings), points(grpo)) == changed


def test_the_papers_length_penalty_starts_a_fifth_before_the_budget():
    rewards = points(dapo, length=20480)["rewards"]
    assert any("soft_overlong(max_tokens=20480, cache_tokens=4096)" in text for text in rewards)


def test_a_length_penalty_longer_than_the_budget_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"soft_overlong_cache is 4096.*is 96: set"):
        halves(dapo, soft_overlong_cache=4096)


def test_a_scorer_of_weight_zero_is_no_reward_and_does_not_keep_a_group():
    found = points(dapo, outcomes={"answer": 2.0, "style": 0.0})
    assert not any("style" in text for text in found["rewards"] + found["select"])
    with pytest.raises(ValueError, match="no scorer has a weight"):
        halves(grpo, outcomes={"style": 0.0})


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "settings", [{"num_generations": 0}, {"delta": 1.0}, {"epsilon": 0}, {"kl_estimator": "k1"}]
)
def test_settings_that_cannot_be_meant_are_refused(name, settings):
    with pytest.raises(ValidationError):
        ALGORITHMS[name].config(**settings)
