"""Engines that get adapters alone: the policy is the learner's, token for token, across swaps."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import UserError, WeightMismatch
from grpo.types import AdapterShape, Rollout, SampleRequest, WeightRef
from orchestration.local import LocalRolloutSpawner
from rollout_workers.config import RolloutConfig
from rollout_workers.environment import engine_environment
from rollout_workers.worker import RolloutWorker
from tests.unit.learner_cases import batch_of, random_rows, rank_of, save, torch_config
from tests.unit.pool_setting import started_engines
from tests.unit.rollout_models import (
    MAX_MODEL_LEN,
    adapted,
    adapter_bundle,
    bundle,
    expected_log_probs,
    largest_gap,
    make_model,
    policy,
    requests,
)

ALL_LINEAR = AdapterShape(rank=3, alpha=2, target_modules="all-linear")
# One slice of a product that vLLM packs (q, k, v) and one layer that it does not pack.
SOME = AdapterShape(rank=8, alpha=4, target_modules=("k_proj", "down_proj"))

PATIENCE = {"deadline_s": 120.0, "start_deadline_s": 120.0}  # a model is loaded


@dataclass(frozen=True, slots=True)
class Served:
    """A started worker, the folder of its model and the shape of its adapters."""

    worker: RolloutWorker
    model: str
    shape: AdapterShape

    def sample(self, wanted: list[SampleRequest]) -> list[Rollout]:
        return asyncio.run(self.worker.sample(wanted))


CASES = {
    "vllm": ("vllm", ALL_LINEAR),
    "vllm-some": ("vllm", SOME),
    "transformers": ("transformers", ALL_LINEAR),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    engine, shape = request.param
    model = make_model(tmp_path_factory.mktemp("model"), tied=True)
    config = RolloutConfig(engine=engine, max_concurrent_rollouts=64, kv_cache_gib=0.1)
    os.environ.update(engine_environment(config, model))
    worker = RolloutWorker(model, config, MAX_MODEL_LEN, shape)
    asyncio.run(worker.start())
    found = Served(worker, model, shape)
    # Before anything arrived: the adapters of a new learner add nothing.
    assert largest_gap(policy(model, seed=0), found.sample(requests(8))) < 1e-4
    yield found
    asyncio.run(worker.close())


def test_loaded_adapters_are_the_policy_from_then_on(served: Served) -> None:
    first = served.sample(requests(8))
    for seed in (1, 2):  # the second does not add to the first
        learned = adapted(served.model, served.shape, seed=seed)
        sent = adapter_bundle(learned, served.shape, 6 + seed)
        report = asyncio.run(served.worker.load_weights(sent))
        assert (report.version, report.checksum) == (6 + seed, sent.checksum)
        rollouts = served.sample(requests(8))  # contexts that the prefix cache has seen before
        assert largest_gap(learned, rollouts) < 1e-4
        assert {int(version) for rollout in rollouts for version in rollout.versions} == {6 + seed}
    # Far from what went before: their log-probabilities tell one policy from the other.
    assert largest_gap(policy(served.model, seed=0), rollouts) > 0.1
    assert first[0].tokens.tolist() != rollouts[0].tokens.tolist()


def test_every_token_carries_the_adapters_that_sampled_it_across_swaps(served: Served) -> None:
    policies = [adapted(served.model, served.shape, seed=seed) for seed in range(3)]

    async def main() -> list[Rollout]:
        bundles = [adapter_bundle(policy, served.shape, 0) for policy in policies]
        await served.worker.load_weights(bundles[0])
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        for version in itertools.count(1):  # as often as the engine takes them
            await served.worker.load_weights(replace(bundles[version % 3], version=version))
            if running.done():
                break
        return await running

    rollouts = asyncio.run(main())
    assert max(len(set(rollout.versions.tolist())) for rollout in rollouts) > 2
    for rollout in rollouts:
        assert (np.diff(rollout.versions) >= 0).all()
        gaps = [np.abs(expected_log_probs(p, rollout) - rollout.log_probs) for p in policies]
        assert np.choose(rollout.versions % 3, gaps).max() < 1e-4


def test_damaged_adapters_are_refused_and_the_old_ones_stay(served: Served) -> None:
    old = adapted(served.model, served.shape, seed=3)
    asyncio.run(served.worker.load_weights(adapter_bundle(old, served.shape, 4)))
    new = adapter_bundle(adapted(served.model, served.shape, seed=4), served.shape, 5)
    with pytest.raises(WeightMismatch, match="xxh3"):
        asyncio.run(served.worker.load_weights(replace(new, checksum=new.checksum ^ 1)))
    rollouts = served.sample(requests(4))
    assert largest_gap(old, rollouts) < 1e-4
    assert rollouts[0].versions[0] == 4


def test_whole_weights_and_adapters_of_another_shape_are_refused(served: Served) -> None:
    whole = bundle(policy(served.model, seed=1), 9)
    with pytest.raises(WeightMismatch, match=r"hold all weights .* started for adapters"):
        asyncio.run(served.worker.load_weights(whole))
    other = replace(served.shape, rank=5)
    sent = adapter_bundle(adapted(served.model, other, seed=1), other, 9)
    with pytest.raises(WeightMismatch, match="rank=5"):
        asyncio.run(served.worker.load_weights(sent))


def test_vllm_reads_the_files_of_a_checkpoint_s_adapter(served: Served, tmp_path: Path) -> None:
    from rollout_workers.vllm_engine import VllmEngine  # reads the environment

    engine = served.worker._started()
    if not isinstance(engine, VllmEngine):
        pytest.skip("for vLLM only")
    lora = asdict(served.shape)
    learner = rank_of(served.model, torch_config(lora=lora, learning_rate=3e-2))
    learner.train(batch_of(random_rows(8)))
    save(learner, tmp_path)
    from vllm.lora.request import LoRARequest

    files = LoRARequest("policy", 1, str(tmp_path / "adapter"), load_inplace=True)
    engine._loop.call(
        lambda batch: batch._engine.collective_rpc("add_lora", args=(files,))
    ).result()
    engine._loop.call(lambda batch: batch.set_version(3)).result()
    rollouts = served.sample(requests(8))
    assert largest_gap(policy(str(tmp_path / "huggingface"), seed=0), rollouts) < 1e-4
    assert largest_gap(policy(served.model, seed=0), rollouts) > 1e-2


def test_a_worker_in_the_place_of_a_lost_one_has_the_adapters_before_it_serves(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path, tied=True)
    config = RolloutConfig(engine="transformers")
    learned = adapted(model, ALL_LINEAR, seed=1)
    sent = adapter_bundle(learned, ALL_LINEAR, 7)
    workers: list[RolloutWorker] = []

    def worker() -> RolloutWorker:
        workers.append(RolloutWorker(model, config, MAX_MODEL_LEN, ALL_LINEAR))
        return workers[-1]

    spawner = LocalRolloutSpawner(worker, asyncio.Lock())

    async def main() -> list[Rollout]:
        async with started_engines(spawner, 2, **PATIENCE) as pool:
            await pool.load_weights(
                WeightRef(
                    version=7, num_bytes=sent.payload.nbytes, checksum=sent.checksum, location=sent
                )
            )
            for lost in workers[:2]:
                await lost.close()  # the next call finds it lost
            groups = await asyncio.gather(*[pool.sample(requests(4)) for _ in range(4)])
        return [rollout for group in groups for rollout in group]

    rollouts = asyncio.run(main())
    assert len(workers) > 2
    assert {int(version) for rollout in rollouts for version in rollout.versions} == {7}
    assert largest_gap(learned, rollouts) < 1e-4


def test_a_name_that_is_no_layer_is_refused_when_the_engine_starts(tmp_path: Path) -> None:
    model = make_model(tmp_path, tied=True)
    shape = AdapterShape(rank=8, alpha=8, target_modules=("q_proj", "c_attn"))
    with pytest.raises(UserError, match=r"names 'c_attn'.*some of: down_proj, gate_proj"):
        asyncio.run(RolloutWorker(model, RolloutConfig(), MAX_MODEL_LEN, shape).start())
