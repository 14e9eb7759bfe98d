"""Weights straight into a real vLLM engine: the policy that the object store would bring.

Over gloo, and from memory that processes on the CPU share; the learner is in processes of its own,
with ZeRO 3 on one rank and on two.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch.distributed
import xxhash
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

import learner.weight_sender
from grpo.errors import StreamBroken
from grpo.types import Rollout, WeightBundle
from grpo.weight_group import WeightGroup
from grpo.weight_stream import WeightStream
from learner.config import LearnerConfig
from learner.weight_sender import WeightSender
from learner.weights import named_weights
from tests.equivalence.learner_processes import free_port
from tests.equivalence.served_worker import Served, serving
from tests.unit.learner_cases import batch_of, random_rows, rank_of
from tests.unit.rollout_models import (
    bundle,
    expected_log_probs,
    largest_gap,
    policy,
    requests,
)
from tests.unit.stream_members import CPU, Spoiling, in_thread, met, send

pytestmark = pytest.mark.slow

BUCKET_BYTES = 2**15  # the embedding of the test model takes twice as much
DEADLINE_S = 120


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("model"), tied=request.param) as started:
        yield started


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.weight_sender, "BUCKET_BYTES", BUCKET_BYTES)


@pytest.fixture(autouse=True)
def original_weights(served: Served) -> None:
    """Every test starts from the weights of the model's folder, as version 0."""
    asyncio.run(served.worker.load_weights(bundle(policy(served.model, seed=0), 0)))


def parts(model: PreTrainedModel) -> list[Mapping[str, Tensor]]:
    return [{name: weight} for name, weight in named_weights(model).items()]


def stream_of(group: WeightGroup, version: int) -> WeightStream:
    return WeightStream(group=group, first_rank=1, version=version)


def publish_both_ways(
    rank: int, config: LearnerConfig, model: str, master: str, pipe: Connection, near: int | None
) -> None:
    """A trained learner's version 1, straight and as an image; runs in a learner's process.

    `near` is the rank that shares memory with the engine; None: rank 0 sends it over gloo.
    """
    learner.weight_sender.BUCKET_BYTES = BUCKET_BYTES
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{master}", rank=rank, world_size=config.ranks
    )
    trained = rank_of(model, config, rank=rank, master=master)
    trained.train(batch_of(random_rows(8)))
    group = None
    if rank == (near or 0):
        port = trained.open_group("127.0.0.1")
        group = WeightGroup(host="127.0.0.1", port=port, size=2, is_local=near is not None)
    pipe.send(group)
    published = trained.publish(1, group)
    pipe.send(b"" if published is None else published.payload.tobytes())
    pipe.recv()  # the engine has all of it
    torch.distributed.destroy_process_group()


@contextmanager
def learner_processes(ranks: int, model: str, near: int | None) -> Iterator[list[Connection]]:
    """A pipe to each rank."""
    config = LearnerConfig(ranks=ranks, zero_stage=3, learning_rate=1e-2)
    context, master = multiprocessing.get_context("spawn"), f"127.0.0.1:{free_port()}"
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=publish_both_ways, args=(rank, config, model, master, pipe, near))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pipes]
        for ours, _ in pipes:
            ours.send("done")
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def told(pipe: Connection) -> object:
    assert pipe.poll(DEADLINE_S), "the learner said nothing"
    return pipe.recv()


@pytest.mark.parametrize(
    ("served", "ranks", "near"),
    [(True, 1, None), (False, 2, None), (True, 1, 0), (False, 2, 1)],
    ids=["tied-1-gloo", "untied-2-gloo", "tied-1-shared", "untied-2-shared"],
    indirect=["served"],
)
def test_weights_of_zero_3_arrive_as_through_the_object_store(
    served: Served, ranks: int, near: int | None
) -> None:
    with learner_processes(ranks, served.model, near) as pipes:
        group = told(pipes[near or 0])
        assert isinstance(group, WeightGroup)
        timings_s = asyncio.run(served.worker.receive_weights(stream_of(group, 1)))
        if near:  # rank 0 has told of its own group, which is none
            assert told(pipes[0]) is None
        image = told(pipes[0])
    assert isinstance(image, bytes)
    assert set(timings_s) == {"pause", "load", "resume"}
    streamed = served.sample(requests(8))
    payload = np.frombuffer(image, np.uint8)
    checksum = xxhash.xxh3_64_intdigest(payload)
    asyncio.run(
        served.worker.load_weights(WeightBundle(version=2, payload=payload, checksum=checksum))
    )
    trained = policy(served.model, seed=0)
    trained.load_state_dict(load(image), strict=False)
    assert largest_gap(policy(served.model, seed=0), streamed) > 1e-3  # it was trained
    assert largest_gap(trained, streamed) < 1e-4
    for one, other in zip(streamed, served.sample(requests(8)), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.abs(one.log_probs - other.log_probs).max() < 1e-4
        assert {*one.versions.tolist()} == {1} and {*other.versions.tolist()} == {2}


def test_every_token_carries_the_weights_that_sampled_it_across_streams(served: Served) -> None:
    policies = [policy(served.model, seed=seed) for seed in range(3)]
    sender = WeightSender(CPU, torch.float32)
    group = met(sender, receivers=1)

    async def main() -> list[Rollout]:
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        version = 0
        while not running.done():
            version += 1
            weights = parts(policies[version % 3])
            sent = in_thread(lambda w=weights, v=version: send(sender, group, w, version=v))
            await served.worker.receive_weights(stream_of(group, version))
            await asyncio.wrap_future(sent)
        return await running

    rollouts = asyncio.run(main())
    assert max(len(set(rollout.versions.tolist())) for rollout in rollouts) > 2
    for rollout in rollouts:
        assert (np.diff(rollout.versions) >= 0).all()
        gaps = [np.abs(expected_log_probs(p, rollout) - rollout.log_probs) for p in policies]
        assert np.choose(rollout.versions % 3, gaps).max() < 1e-4


def test_a_spoilt_byte_is_refused_and_nothing_is_sampled_until_a_bundle_is_loaded(
    served: Served,
) -> None:
    from rollout_workers.vllm_engine import VllmEngine  # reads the environment

    engine, new = served.worker._started(), policy(served.model, seed=1)
    assert isinstance(engine, VllmEngine)
    sender = WeightSender(CPU, torch.float32)
    group = met(sender, receivers=1)

    def spoil() -> None:
        sender._member = Spoiling(sender._member, bucket=1, byte=100)  # type: ignore[assignment]

    async def main() -> list[Rollout]:
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        sent = in_thread(lambda: send(sender, group, parts(new), before=spoil))
        with pytest.raises(StreamBroken, match="arrived with sum"):
            await served.worker.receive_weights(stream_of(group, 1))
        await asyncio.wrap_future(sent)
        assert not await asyncio.wrap_future(engine._loop.call(lambda batch: batch.busy()))
        late = asyncio.create_task(served.worker.sample(requests(2, seed=5)))
        await served.worker.load_weights(bundle(new, 1))
        return [*await running, *await late]

    rollouts = asyncio.run(main())
    assert len(rollouts) == 10
    for rollout in rollouts:
        assert {*rollout.versions.tolist()} <= {0, 1}
        gaps = [
            np.abs(expected_log_probs(p, rollout) - rollout.log_probs)
            for p in (policy(served.model, seed=0), new)
        ]
        assert np.choose(rollout.versions, gaps).max() < 1e-4


def die_before_the_end(pipe: Connection, model: str) -> None:
    """A learner's process that is killed in the middle of a version."""
    learner.weight_sender.BUCKET_BYTES = BUCKET_BYTES
    sender = WeightSender(CPU, torch.float32)
    group = met(sender, receivers=1)
    pipe.send(group)
    sender.begun(group, 1)
    for part in parts(policy(model, seed=1))[:8]:
        sender.add(part)
    assert sender._num_sent > 1
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("served", [True], ids=["tied"], indirect=True)
def test_a_learner_killed_in_the_middle_leaves_the_requests_to_the_next_bundle(
    served: Served,
) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    victim = context.Process(target=die_before_the_end, args=(end, served.model))
    victim.start()
    group = told(pipe)
    assert isinstance(group, WeightGroup)
    recovered = policy(served.model, seed=2)

    async def main() -> list[Rollout]:
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        with pytest.raises(StreamBroken):
            await served.worker.receive_weights(stream_of(group, 1))
        await served.worker.load_weights(bundle(recovered, 2))
        return await running

    for rollout in asyncio.run(main()):
        assert {*rollout.versions.tolist()} <= {0, 2}
        gaps = [
            np.abs(expected_log_probs(p, rollout) - rollout.log_probs)
            for p in (policy(served.model, seed=0), recovered)
        ]
        assert np.choose(rollout.versions // 2, gaps).max() < 1e-4
    victim.join(DEADLINE_S)
    assert victim.exitcode == -signal.SIGKILL


def die_at_the_second_bucket(group: WeightGroup) -> None:
    """A worker's process that is killed in the middle of a version."""
    from rollout_workers.weight_receiver import WeightReceiver

    stream = WeightStream(group=group, first_rank=2, version=1)
    for number, _ in enumerate(WeightReceiver(CPU).buckets(stream, process=0)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("served", [True], ids=["tied"], indirect=True)
def test_a_worker_killed_in_the_middle_hangs_nobody_and_the_rest_go_on(served: Served) -> None:
    new, newer = policy(served.model, seed=1), policy(served.model, seed=2)
    sender = WeightSender(CPU, torch.float32)
    group = met(sender, receivers=2)
    victim = multiprocessing.get_context("spawn").Process(
        target=die_at_the_second_bucket, args=(group,)
    )
    victim.start()

    async def main() -> list[Rollout]:
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        sent = in_thread(lambda: send(sender, group, parts(new)))
        with pytest.raises(StreamBroken):
            await served.worker.receive_weights(stream_of(group, 1))
        await asyncio.wrap_future(sent)  # the learner has been told of no error
        await served.worker.load_weights(bundle(new, 1))
        again = met(sender, receivers=1)
        sent = in_thread(lambda: send(sender, again, parts(newer), version=2))
        await served.worker.receive_weights(stream_of(again, 2))
        await asyncio.wrap_future(sent)
        return await running

    async def in_time() -> list[Rollout]:
        async with asyncio.timeout(DEADLINE_S):
            return await main()

    rollouts = asyncio.run(in_time())
    victim.join(DEADLINE_S)
    assert victim.exitcode == -signal.SIGKILL
    policies = [policy(served.model, seed=0), new, newer]
    assert {2} <= {int(version) for rollout in rollouts for version in rollout.versions}
    for rollout in rollouts:
        gaps = [np.abs(expected_log_probs(p, rollout) - rollout.log_probs) for p in policies]
        assert np.choose(rollout.versions, gaps).max() < 1e-4
