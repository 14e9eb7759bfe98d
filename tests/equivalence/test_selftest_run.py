"""The self-test with real engines: it passes, and a tensor that the sync spoils makes it fail.

The spoilt weights are published with a checksum of their own, so that they arrive undamaged: only
the log-probabilities can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import safetensors.torch
import xxhash

from grpo.types import (
    Prompt,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightBundle,
    WeightRef,
)
from orchestration.config import Recipe
from orchestration.roles import Learner, Roles, started_roles
from orchestration.selftest import (
    SelftestReport,
    selftest,
    selftest_recipe,
    selftest_requests,
)
from orchestration.waits import Waits
from tests.unit.rollout_models import make_model

STEPS = 3
SPOILT = "model.layers.1.mlp.down_proj.weight"
SPOILT_ADAPTER = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
PROMPTS = [
    Prompt(id=str(n), text="", tokens=np.arange(5 + n, 12 + 3 * n, dtype=np.int32))
    for n in range(4)
]


class SpoilingLearner:
    """Publishes one tensor too large, with the right checksum of the wrong weights."""

    def __init__(self, learner: Learner, *, from_version: int, name: str, factor: float) -> None:
        self._learner = learner
        self._from_version = from_version
        self._name = name
        self._factor = factor

    async def train(self, batch: TrainBatch) -> StepReport:
        return await self._learner.train(batch)

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return await self._learner.log_probs(rows)

    async def publish(self, version: int) -> WeightRef:
        ref = await self._learner.publish(version)
        if version < self._from_version:
            return ref
        whole = cast(WeightBundle, ref.location)
        weights = safetensors.torch.load(whole.payload.tobytes())
        weights[self._name] *= self._factor
        payload = np.frombuffer(safetensors.torch.save(weights, {"format": "pt"}), np.uint8)
        checksum = xxhash.xxh3_64_intdigest(payload)
        bundle = replace(whole, payload=payload, checksum=checksum)
        return replace(ref, checksum=checksum, location=bundle)


def a_recipe(model: str, engine: str, **changes: object) -> Recipe:
    recipe = Recipe.model_validate(
        {
            "name": "selftest",
            "model": model,
            "steps": 1,
            "data": {"train": "none.jsonl"},
            "sampling": {"max_prompt_length": 40, "max_completion_length": 24},
            "algorithm": {"name": "grpo", "num_generations": 4},
            "scorers": [{"name": "answer", "rule": "exact"}],
            "rollout": {"engine": engine, "kv_cache_gib": 0.1, "max_concurrent_rollouts": 32},
            "learner": {"backend": "torch", "learning_rate": 1e-2},
            **changes,
        }
    )
    return selftest_recipe(recipe)


async def report_of(recipe: Recipe, roles: Roles, learner: object) -> SelftestReport:
    return await selftest(
        recipe,
        roles.engine,
        cast(Learner, learner),
        selftest_requests(recipe, lambda group: PROMPTS[group % len(PROMPTS)]),
        steps=STEPS,
        on_step=lambda step: None,
    )


async def whole_and_spoilt(
    recipe: Recipe, *, name: str, factor: float
) -> tuple[SelftestReport, SelftestReport]:
    """The same roles twice: as they are, then with a sync that is spoilt from step 2 on."""
    async with started_roles(recipe, local=True, waits=Waits(), on_phase=lambda _: None) as roles:
        whole = await report_of(recipe, roles, roles.learner)
        await roles.engine.load_weights(await roles.learner.publish(0))  # begin anew
        learner = SpoilingLearner(roles.learner, from_version=2, name=name, factor=factor)
        spoilt = await report_of(recipe, roles, learner)
    return whole, spoilt


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_nothing_moves_until_a_tensor_of_the_sync_is_spoilt(
    engine: str, is_tied: bool, tmp_path: Path
) -> None:
    model = make_model(tmp_path, tied=is_tied)
    recipe = a_recipe(model, engine)
    whole, spoilt = asyncio.run(whole_and_spoilt(recipe, name=SPOILT, factor=1.02))
    assert whole.moved == ()
    assert len({step.checksum for step in whole.steps}) == 1
    assert max(step.gap.mean for step in whole.steps) < 1e-5
    assert [step.num_equal for step in whole.steps] == [16] * STEPS
    assert not spoilt.has_passed
    said = " ".join(spoilt.moved)
    assert "the difference moved" in said and "after the sync of step 2" in said
    assert spoilt.steps[1].gap.mean < 1e-5  # the sync of step 1 was whole
    assert min(spoilt.after.mean, spoilt.steps[2].gap.mean) > 1e-4


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_adapters_stay_where_the_first_step_left_them_until_one_is_spoilt(
    engine: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path, tied=True)
    learner = {"backend": "torch", "lora": {"rank": 4, "publish": "adapter"}}
    recipe = a_recipe(model, engine, learner=learner)
    whole, spoilt = asyncio.run(whole_and_spoilt(recipe, name=SPOILT_ADAPTER, factor=2.0))
    assert whole.moved == ()
    assert len({step.checksum for step in whole.steps}) == 1
    assert max(step.gap.mean for step in whole.steps) < 1e-5
    assert whole.steps[1].num_equal < 16  # the policy did move before it came to rest
    said = " ".join(spoilt.moved)
    assert "the difference moved" in said and "after the sync of step 2" in said
    assert spoilt.steps[1].gap.mean < 1e-5  # the sync of step 1 was whole


def test_a_learner_that_moves_its_weights_is_found(tmp_path: Path) -> None:
    recipe = a_recipe(make_model(tmp_path, tied=True), "transformers")
    wrong = recipe.model_copy(
        update={"learner": recipe.learner.model_copy(update={"learning_rate": 1e-3})}
    )

    async def run() -> SelftestReport:
        async with started_roles(
            wrong, local=True, waits=Waits(), on_phase=lambda _: None
        ) as roles:
            return await report_of(recipe, roles, roles.learner)

    moved = asyncio.run(run()).moved
    assert any(reason.startswith("the policy moved: step 1 published") for reason in moved)
    assert any("own log-probabilities" in reason for reason in moved)


def test_an_engine_that_starts_with_other_weights_is_found_before_any_sync(tmp_path: Path) -> None:
    recipe = a_recipe(make_model(tmp_path, tied=True), "transformers")

    async def run() -> SelftestReport:
        async with started_roles(
            recipe, local=True, waits=Waits(), on_phase=lambda _: None
        ) as roles:
            other = SpoilingLearner(roles.learner, from_version=0, name=SPOILT, factor=1.02)
            await roles.engine.load_weights(await other.publish(0))
            return await report_of(recipe, roles, roles.learner)

    (reason,) = asyncio.run(run()).moved
    assert reason.startswith("engine and learner differ before any step")
