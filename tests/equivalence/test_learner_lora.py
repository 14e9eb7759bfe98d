"""Adapters under DeepSpeed on two ranks are those of the torch backend."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from learner.config import LearnerConfig
from tests.equivalence.learner_processes import Outcome, outcomes_of, run_whole_groups
from tests.unit.learner_cases import merged_weights, torch_config, write_model
from tests.unit.learner_objectives import WHOLE_GROUPS

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8}
SETTINGS: dict[str, object] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_tokens_per_microbatch": 50,
    "lora": LORA,
}
PUBLISHED = {2: "merged", 3: "adapter"}
STAGES = list(PUBLISHED)
# The reference stays: a pass of the policy without adapters, on all ranks together.
run = partial(run_whole_groups, objective=replace(WHOLE_GROUPS, reference_update=None))


@pytest.fixture(scope="module")
def by_torch_and_by_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Outcome, dict[int, list[Outcome]]]:
    """The torch backend, and both ranks by ZeRO stage."""
    folder = tmp_path_factory.mktemp("lora")
    model = write_model(folder / "model")
    environment = dict(os.environ)
    by_torch = run(
        torch_config(**SETTINGS), model=model, rank=0, master="127.0.0.1:1", folder=folder / "torch"
    )
    os.environ.clear()
    os.environ.update(environment)
    configs = {
        f"zero{stage}": LearnerConfig.model_validate(
            SETTINGS
            | {"zero_stage": stage, "ranks": 2, "lora": LORA | {"publish": PUBLISHED[stage]}}
        )
        for stage in STAGES
    }
    found = outcomes_of(configs, ranks=2, model=model, folder=folder, run=run)
    return by_torch, {
        stage: [outcomes.get(name, Outcome(error="not run")) for outcomes in found]
        for stage, name in zip(STAGES, configs, strict=True)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_cut_by_ranks_train_resume_and_answer_alike(
    by_torch_and_by_ranks: tuple[Outcome, dict[int, list[Outcome]]], stage: int, tmp_path: Path
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
    if PUBLISHED[stage] == "adapter":
        base = load_file(Path(write_model(tmp_path)) / "model.safetensors")
        weights = merged_weights(base, weights, scale=8 / 4)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-5, rtol=0)
