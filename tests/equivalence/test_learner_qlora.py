"""Adapters beside a base in 4 bits: two ranks are one, and engines have the learner's policy."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from learner.config import LearnerConfig
from orchestration.roles import started_roles
from orchestration.selftest import SelftestReport
from orchestration.waits import Waits
from tests.end_to_end.runs import finished, only_run, train
from tests.equivalence.learner_processes import Outcome, outcomes_of, run_whole_groups
from tests.equivalence.test_selftest_run import STEPS, a_recipe, report_of
from tests.unit.learner_cases import torch_config, write_model
from tests.unit.learner_objectives import WHOLE_GROUPS
from tests.unit.rollout_models import make_model

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8, "quantization": "nf4"}
SETTINGS: dict[str, object] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_tokens_per_microbatch": 50,
    "lora": LORA,
}
STAGES = [0, 2, 3]
# The reference stays: a pass of the policy without adapters, on all ranks together.
run = partial(run_whole_groups, objective=replace(WHOLE_GROUPS, reference_update=None))


@pytest.fixture(scope="module")
def by_torch_and_by_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Outcome, dict[int, list[Outcome]]]:
    """The torch backend, and both ranks by ZeRO stage."""
    folder = tmp_path_factory.mktemp("qlora")
    model = write_model(folder / "model")
    environment = dict(os.environ)
    by_torch = run(
        torch_config(**SETTINGS), model=model, rank=0, master="127.0.0.1:1", folder=folder / "torch"
    )
    os.environ.clear()
    os.environ.update(environment)
    configs = {
        f"zero{stage}": LearnerConfig.model_validate(SETTINGS | {"zero_stage": stage, "ranks": 2})
        for stage in STAGES
    }
    found = outcomes_of(configs, ranks=2, model=model, folder=folder, run=run)
    return by_torch, {
        stage: [outcomes.get(name, Outcome(error="not run")) for outcomes in found]
        for stage, name in zip(STAGES, configs, strict=True)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_beside_a_rounded_base_train_resume_and_answer_as_one(
    by_torch_and_by_ranks: tuple[Outcome, dict[int, list[Outcome]]], stage: int
) -> None:
    by_torch, by_ranks = by_torch_and_by_ranks
    for outcome in by_ranks[stage]:
        assert not outcome.error, outcome.error
        for metrics, expected in zip(outcome.metrics, by_torch.metrics, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-4)
        for found, group in zip(
            outcome.answers["reference"], by_torch.answers["reference"], strict=True
        ):
            for values, others in zip(found, group, strict=True):
                assert values == pytest.approx(others, abs=1e-4)
    first = by_ranks[stage][0]
    assert first.metrics[2]["kl"] > 1e-5  # the reference is not the policy
    assert first.resumed_image == first.image
    weights, expected_weights = load(first.image), load(by_torch.image)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_engines_that_read_the_whole_base_have_the_rounded_one_from_the_first_step_on(
    engine: str, tmp_path: Path
) -> None:
    learner = {"backend": "torch", "lora": LORA}
    recipe = a_recipe(make_model(tmp_path, tied=True), engine, learner=learner)

    async def reports() -> SelftestReport:
        async with started_roles(
            recipe, local=True, waits=Waits(), on_phase=lambda _: None
        ) as roles:
            return await report_of(recipe, roles, roles.learner)

    report = asyncio.run(reports())
    assert report.moved == ()
    assert len(report.steps) == STEPS
    assert max(step.gap.mean for step in report.steps) < 1e-5
    assert report.steps[1].num_equal < 16  # the policy did move before it came to rest


def test_a_run_begins_with_the_rounded_base_and_its_rollouts_stay_those_of_the_learner(
    tmp_path: Path,
) -> None:
    changes = {"learner.lora.quantization": "nf4", "rollout.engine": "transformers"}
    run = train(tmp_path, "--local", steps=3, data__evaluation=None, **changes)
    text = finished(run)
    assert run.returncode == 0, text
    steps = only_run(tmp_path / "runs").steps
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert max(step["log_prob_gap/max"] for step in steps) < 1e-3
