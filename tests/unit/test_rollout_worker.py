"""What a rollout worker does with failures, and what it asks of its process."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pydantic
import pytest
import xxhash

from grpo.errors import Fatal, PromptTooLong, Transient, UserError, WorkerLost
from grpo.types import WeightBundle
from rollout_workers.config import RolloutConfig
from rollout_workers.environment import engine_environment
from rollout_workers.step_loop import StepLoop
from rollout_workers.worker import RolloutWorker
from tests.unit.rollout_models import MAX_MODEL_LEN, bundle, make_model, policy, requests

SMALL = RolloutConfig(engine="transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), tied=True)


class Breaking:
    """A stepper that fails at its third step."""

    def __init__(self) -> None:
        self.steps = 0
        self.running: list[Future[str]] = []

    def busy(self) -> bool:
        return bool(self.running)

    def step(self) -> None:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of memory")

    def shutdown(self, error: WorkerLost) -> None:
        for future in self.running:
            future.set_exception(error)


def test_a_missing_model_is_the_user_s_mistake(tmp_path: Path) -> None:
    worker = RolloutWorker(str(tmp_path), SMALL, MAX_MODEL_LEN)
    with pytest.raises(UserError, match="holds no tokenizer"):
        asyncio.run(worker.start())


def test_a_prompt_that_is_too_long_keeps_its_kind(model: str) -> None:
    async def main() -> None:
        worker = RolloutWorker(model, SMALL, MAX_MODEL_LEN)
        await worker.start()
        with pytest.raises(PromptTooLong):
            await worker.sample(requests(1, max_tokens=1000))
        await worker.close()

    asyncio.run(main())


def test_weights_that_are_no_safetensors_image_end_the_run(model: str) -> None:
    async def main() -> None:
        worker = RolloutWorker(model, SMALL, MAX_MODEL_LEN)
        await worker.start()
        noise = WeightBundle(
            version=1,
            payload=np.zeros(16, np.uint8),
            checksum=xxhash.xxh3_64_intdigest(bytes(16)),
        )
        with pytest.raises(Fatal, match="weights of version 1 could not be loaded"):
            await worker.load_weights(noise)
        await worker.close()

    asyncio.run(main())


def test_a_closed_worker_is_lost_for_its_callers(model: str) -> None:
    async def main() -> None:
        worker = RolloutWorker(model, SMALL, MAX_MODEL_LEN)
        await worker.start()
        running = asyncio.create_task(worker.sample(requests(4, max_tokens=200)))
        await worker.load_weights(bundle(policy(model, seed=0), 1))  # the call above has begun
        await worker.close()
        with pytest.raises(WorkerLost):
            await running
        with pytest.raises(WorkerLost) as caught:
            await worker.sample(requests(1))
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), Transient)

    asyncio.run(main())


def test_an_engine_that_breaks_fails_everybody_who_waits_and_who_comes_later() -> None:
    loop = StepLoop("test-engine", Breaking)
    loop.start().result(timeout=10)
    future: Future[str] = Future()
    loop.call(lambda stepper: stepper.running.append(future)).result(timeout=10)
    with pytest.raises(WorkerLost, match="out of memory"):
        future.result(timeout=10)
    with pytest.raises(WorkerLost, match="out of memory"):
        loop.call(Breaking.busy).result(timeout=10)
    loop.stop()


def test_a_command_that_fails_is_its_caller_s_problem_alone() -> None:
    loop = StepLoop("test-engine", Breaking)
    loop.start().result(timeout=10)
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda stepper: 1 / stepper.steps).result(timeout=10)
    assert loop.call(Breaking.busy).result(timeout=10) is False
    loop.stop()


def test_an_engine_that_cannot_be_built_says_why_and_takes_no_commands() -> None:
    def build() -> Breaking:
        raise OSError("no such device")

    loop = StepLoop("test-engine", build)
    with pytest.raises(OSError, match="no such device"):
        loop.start().result(timeout=10)
    with pytest.raises(WorkerLost):
        loop.call(Breaking.busy).result(timeout=10)


def test_an_engine_on_the_cpu_is_eager_unless_told_otherwise() -> None:
    assert RolloutConfig().eager
    assert not RolloutConfig(gpus_per_worker=1).eager
    assert RolloutConfig(gpus_per_worker=1, enforce_eager=True).eager


def test_a_worker_s_gpus_all_share_one_copy_of_the_weights() -> None:
    assert RolloutConfig().tensor_parallel_size == 1
    assert RolloutConfig(gpus_per_worker=4).tensor_parallel_size == 4
    assert RolloutConfig(gpus_per_worker=0.4).tensor_parallel_size == 1


def test_the_transformers_engine_refuses_several_gpus() -> None:
    with pytest.raises(pydantic.ValidationError, match="one device"):
        RolloutConfig(engine="transformers", gpus_per_worker=2)


def test_the_environment_stays_offline_for_a_local_model_only(tmp_path: Path) -> None:
    config = RolloutConfig(cpus_per_worker=2)
    local = engine_environment(config, str(tmp_path))
    assert local["HF_HUB_OFFLINE"] == "1"
    assert local["OMP_NUM_THREADS"] == "2"
    assert "HF_HUB_OFFLINE" not in engine_environment(config, "some/model")


def test_only_vllm_gets_vllm_s_variables(tmp_path: Path) -> None:
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in engine_environment(RolloutConfig(), "some/model")
    assert not [name for name in engine_environment(SMALL, "some/model") if "VLLM" in name]


@pytest.mark.parametrize(("gpus", "expected"), [(0.4, 0.34), (1, 0.85), (2, 0.85)])
def test_vllm_takes_its_share_of_the_part_of_a_gpu_that_a_worker_has(
    gpus: float, expected: float
) -> None:
    config = RolloutConfig(gpus_per_worker=gpus, gpu_memory_utilization=0.85)
    assert config.gpu_memory_share == pytest.approx(expected)
