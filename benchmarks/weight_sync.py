"""One weight sync against one memcpy of the same bytes, phase by phase.

    python -m benchmarks.weight_sync                       about 1M, 10M and 100M parameters
    python -m benchmarks.weight_sync --sizes 100M --turns 9
    python -m benchmarks.weight_sync --broadcast           the same weights by broadcast, too
    python -m benchmarks.weight_sync --adapters            merged weights against adapters alone

The torch learner and a vLLM engine on the CPU in one process, float32, the sync of a run
(orchestration/weight_sync.py). The memcpy goes into memory that was written before, in the same
turn as the sync; ratios are medians over the turns. `publish` is the learner's part, with the
checksum, which is measured once more by itself. The rest are the engine's phases: what it reports.

With --broadcast as many versions follow by `rollout.weight_transport: broadcast`, over gloo in this
one process: `workers have it` is until the engine samples under the new weights, `publish` until
the learner is free again, with the image that new workers load.

With --adapters every size is measured twice, with LoRA of rank 16 beside all linear layers: once
the merged model is published, once A and B. `rollout` is what adapters cost in turn: 32 rollouts
of 32 tokens after a context of 60.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import xxhash

from benchmarks.random_models import written_model
from grpo.types import SampleRequest, Sampling, WeightBundle
from grpo.weight_group import WeightGroup
from grpo.weight_stream import WeightStream
from learner.config import LearnerConfig, LoraConfig
from learner.rank import LearnerRank
from orchestration.local import LocalLearner, LocalRolloutWorker
from orchestration.weight_sync import sync_weights
from rollout_workers.config import RolloutConfig
from rollout_workers.worker import RolloutWorker
from tests.unit.rollout_models import byte_tokenizer

SIZES = {"1M": "0.8M", "10M": "10M", "100M": "100M"}
LEARNER = LearnerConfig(backend="torch", cpus_per_rank=2)
ROLLOUT = RolloutConfig(max_concurrent_rollouts=64, kv_cache_gib=0.2, cpus_per_worker=2)
MAX_MODEL_LEN = 128
PUBLISHED = ("merged", "adapter")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_sync")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--turns", type=int, default=7, help="syncs of each size (7)")
    parser.add_argument("--broadcast", action="store_true", help="the object store against it")
    parser.add_argument("--adapters", action="store_true", help="merged weights against adapters")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = written_model(SIZES[size], Path(folder))
            byte_tokenizer().save_pretrained(folder)
            for published in PUBLISHED if options.adapters else (None,):
                config = LEARNER
                if published is not None:
                    lora = LoraConfig(rank=16, publish=published)
                    config = LEARNER.model_copy(update={"lora": lora})
                asyncio.run(
                    _measure(
                        f"{size} {published or ''}",
                        str(model),
                        config,
                        options.turns,
                        with_broadcast=options.broadcast and published != "adapter",
                    )
                )


async def _measure(
    title: str, model: str, config: LearnerConfig, turns: int, *, with_broadcast: bool
) -> None:
    rank = _learner(model, config)
    learner = LocalLearner(rank, asyncio.Lock())
    await learner.start()
    worker = RolloutWorker(model, ROLLOUT, MAX_MODEL_LEN, config.published_adapters)
    await worker.start()
    engine = LocalRolloutWorker(worker)
    phases: list[dict[str, float]] = []
    for version in range(turns + 2):
        started = time.perf_counter()
        report = await sync_weights(learner, engine, version)
        total = time.perf_counter() - started
        bundle = report.ref.location
        assert isinstance(bundle, WeightBundle)
        alone = {"memcpy": _memcpy_seconds(bundle), "checksum alone": _checksum_seconds(bundle)}
        phases.append({"total": total, **report.timings_s, **alone})
    num_bytes = report.ref.num_bytes
    del phases[:2]  # they allocate, and vLLM looks for its loaders
    broadcasts = await _broadcasts(rank, worker, turns) if with_broadcast else []
    speeds = [await _rollout_speed(worker) for _ in range(3)] if config.lora else []
    await worker.close()
    await learner.close()
    _print(f"{title} parameters", num_bytes, phases)
    if broadcasts:
        _print(f"{title} parameters by broadcast", num_bytes, broadcasts)
    if speeds:
        print(f"  {'rollout':16}{median(speeds):10.0f} tokens/s")


async def _broadcasts(
    rank: LearnerRank, worker: RolloutWorker, turns: int
) -> list[dict[str, float]]:
    """As many versions more, and their phases."""
    host = "127.0.0.1"
    group = WeightGroup(host=host, port=rank.open_group(host), size=2)
    phases: list[dict[str, float]] = []
    for version in range(100, 102 + turns):
        stream = WeightStream(group=group, first_rank=1, version=version)
        started = time.perf_counter()
        publishing = asyncio.create_task(asyncio.to_thread(rank.publish, version, group))
        timings_s = await worker.receive_weights(stream)
        received = time.perf_counter() - started
        bundle = await publishing
        published = time.perf_counter() - started
        assert bundle is not None
        found = {"workers have it": received, "publish": published, **timings_s}
        phases.append({**found, "memcpy": _memcpy_seconds(bundle)})
    return phases[2:]  # as above


async def _rollout_speed(worker: RolloutWorker) -> float:
    """Tokens per second of 32 rollouts; no context is like another, nor like one before."""
    rng = np.random.default_rng()
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=32)
    requests = [
        SampleRequest(
            group=0,
            index=index,
            context=rng.integers(0, 256, 60).astype(np.int32),
            guidance=np.zeros(0, np.int32),
            sampling=sampling,
            seed=index,
        )
        for index in range(32)
    ]
    started = time.perf_counter()
    rollouts = await worker.sample(requests)
    return sum(rollout.num_tokens for rollout in rollouts) / (time.perf_counter() - started)


def _print(title: str, num_bytes: int, phases: Sequence[dict[str, float]]) -> None:
    print(f"{title}, {num_bytes / 1e6:.1f} MB, medians of {len(phases)} syncs")
    for name in phases[0]:
        seconds = median(found[name] for found in phases)
        ratio = median(found[name] / found["memcpy"] for found in phases)
        print(f"  {name:16}{1e3 * seconds:10.2f} ms{ratio:8.2f} memcpy")


def _memcpy_seconds(bundle: WeightBundle) -> float:
    target = np.ones_like(bundle.payload)
    return min(_seconds(lambda: np.copyto(target, bundle.payload)) for _ in range(3))


def _checksum_seconds(bundle: WeightBundle) -> float:
    return _seconds(lambda: xxhash.xxh3_64_intdigest(bundle.payload))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _learner(model: str, config: LearnerConfig) -> LearnerRank:
    return LearnerRank(
        model=model,
        config=config,
        algorithm={"name": "grpo"},
        total_steps=100,
        temperature=1.0,
        rank=0,
        world_size=1,
        master="127.0.0.1:0",
        seed=0,
    )


if __name__ == "__main__":
    main()
