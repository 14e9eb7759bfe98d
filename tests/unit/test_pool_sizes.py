"""Pools that grow and shrink under calls: nothing is lost, the last wish counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from grpo.errors import Fatal, Transient, WorkerLost
from grpo.types import Rollout, SampleRequest
from orchestration.places import PoolSizes
from orchestration.waits import Waits
from tests.fakes import FakeEngine
from tests.unit.pool_setting import started_engines
from tests.unit.test_pool import EngineSpawner, SlowLoading, a_ref, requests, turns


def sizes(wanted: int, ready: int, *, starting: int = 0, leaving: int = 0) -> PoolSizes:
    return PoolSizes(wanted=wanted, ready=ready, starting=starting, leaving=leaving)


def test_new_workers_start_at_once_and_serve_when_they_hold_the_weights() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        spawner = EngineSpawner(ready=[FakeEngine()], gate=gate)
        async with started_engines(spawner, 1) as pool:
            await pool.load_weights(a_ref(4))
            pool.pool.resize(3)
            await turns()
            assert pool.pool.sizes == sizes(3, 1, starting=2)
            gate.set()
            await turns()
            assert pool.pool.sizes == sizes(3, 3)
            assert [engine.version for engine in spawner.made] == [4, 4, 4]

    asyncio.run(scenario())


def test_a_leaving_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        stays, leaves = FakeEngine(), FakeEngine(gate=gate)
        spawner = EngineSpawner(ready=[stays, leaves])
        async with started_engines(spawner, 2) as pool:
            stays.gate = gate
            calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(2)]
            await turns()
            pool.pool.resize(1)
            stays.gate = None
            await pool.sample(requests(2))
            assert {r.group for r in leaves.asked} == {1}
            assert spawner.discarded == []
            assert pool.pool.sizes == sizes(1, 1, leaving=1)
            gate.set()
            assert [len(rollouts) for rollouts in await asyncio.gather(*calls)] == [2, 2]
            await turns()
            assert spawner.discarded == [leaves]
            assert pool.pool.sizes == sizes(1, 1)
            assert pool.pool.num_replaced == 0

    asyncio.run(scenario())


def test_a_leaving_worker_that_never_finishes_hands_its_calls_over() -> None:
    told: list[str] = []

    async def scenario() -> None:
        gate = asyncio.Event()
        stays, hangs = FakeEngine(gate=gate), FakeEngine(gate=asyncio.Event())
        waits = Waits(on_trouble=told.append)
        spawner = EngineSpawner(ready=[stays, hangs])
        async with started_engines(spawner, 2, deadline_s=0.1, waits=waits) as pool:
            calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(2)]
            await turns()
            pool.pool.resize(1)
            gate.set()
            assert [len(rollouts) for rollouts in await asyncio.gather(*calls)] == [2, 2]
            assert {r.group for r in stays.asked} == {0, 1}
            await turns()
            assert (len(spawner.made), spawner.discarded) == (2, [hangs])
            assert pool.pool.sizes == sizes(1, 1)

    asyncio.run(scenario())
    assert told[0].startswith("rollout worker 1 was leaving and is ended: rollout worker 1 has not")


class DiesAnswering(FakeEngine):
    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        await super().sample(requests)
        raise WorkerLost("gone")


def test_a_leaving_worker_that_is_lost_is_not_replaced() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        engines = [FakeEngine(gate=gate), DiesAnswering(gate=gate)]
        spawner = EngineSpawner(ready=list(engines))
        async with started_engines(spawner, 2) as pool:
            calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(2)]
            await turns()
            pool.pool.resize(1)
            gate.set()
            assert [len(rollouts) for rollouts in await asyncio.gather(*calls)] == [2, 2]
            await turns()
            assert (spawner.made, spawner.discarded) == (engines, engines[1:])
            assert pool.pool.sizes == sizes(1, 1)

    asyncio.run(scenario())


def test_the_last_of_several_wishes_counts() -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine()], gate=asyncio.Event())
        async with started_engines(spawner, 1) as pool:
            for wish in (4, 2, 5, 3, 3):
                pool.pool.resize(wish)
            await turns()
            assert pool.pool.sizes == sizes(3, 1, starting=2)
            assert spawner.gate is not None
            spawner.gate.set()
            await turns()
            assert pool.pool.sizes == sizes(3, 3)
            assert len(spawner.made) == 3

    asyncio.run(scenario())


def test_a_leaving_worker_that_is_wanted_again_stays() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        engines = [FakeEngine(gate=gate), FakeEngine(gate=gate)]
        spawner = EngineSpawner(ready=list(engines))
        async with started_engines(spawner, 2) as pool:
            calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(2)]
            await turns()
            pool.pool.resize(1)
            await turns()
            assert pool.pool.sizes == sizes(1, 1, leaving=1)
            pool.pool.resize(2)
            await turns()
            assert pool.pool.sizes == sizes(2, 2)
            gate.set()
            await asyncio.gather(*calls)
            await turns()
            assert (spawner.made, spawner.discarded) == (engines, [])

    asyncio.run(scenario())


def test_a_worker_that_is_starting_leaves_before_one_that_serves() -> None:
    async def scenario() -> None:
        dying, healthy = FakeEngine(failures=[WorkerLost("gone")]), FakeEngine()
        spawner = EngineSpawner(ready=[dying, healthy], gate=asyncio.Event())
        async with started_engines(spawner, 2) as pool:
            await pool.sample(requests(0))  # place 0 is being filled again
            pool.pool.resize(1)
            await turns()
            assert pool.pool.sizes == sizes(1, 1)
            assert pool.pool.workers == [healthy]

    asyncio.run(scenario())


def test_one_that_leaves_while_it_catches_up_is_ended() -> None:
    async def scenario() -> None:
        late = SlowLoading()
        spawner = EngineSpawner(ready=[FakeEngine(), late])
        async with started_engines(spawner, 1) as pool:
            await pool.load_weights(a_ref(1))
            pool.pool.resize(2)
            await turns()
            assert list(late.loads) == [1]
            pool.pool.resize(1)
            await turns()
            assert spawner.discarded == [late]
            assert pool.pool.sizes == sizes(1, 1)

    asyncio.run(scenario())


def test_a_worker_more_that_can_never_start_leaves_the_pool_as_it_was_and_says_why() -> None:
    told: list[str] = []

    async def scenario() -> None:
        spawner = EngineSpawner()
        waits = Waits(on_trouble=told.append)
        async with started_engines(spawner, 1, waits=waits) as pool:
            spawner.failures += [Fatal("an actor raised ValueError: no memory for the cache")]
            pool.pool.resize(3)
            await turns()
            assert pool.pool.sizes == sizes(2, 2)
            assert "no memory for the cache" in (pool.pool.setback or "")
            assert len(await pool.sample(requests(0))) == 2
            pool.pool.resize(3)
            await turns()
            assert (pool.pool.sizes, pool.pool.setback) == (sizes(3, 3), None)

    asyncio.run(scenario())
    assert told[-1].endswith("rollout worker: the pool goes on with 2")


def test_a_worker_more_that_finds_no_room_yet_stays_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestration.pool.FIRST_PAUSE_S", 0.001)

    async def scenario() -> None:
        spawner = EngineSpawner()
        async with started_engines(spawner, 1) as pool:
            spawner.failures += [Transient("no room"), Transient("no room")]
            pool.pool.resize(2)
            while pool.pool.sizes.ready < 2:
                await pool.sample(requests(0))
            assert pool.pool.sizes == sizes(2, 2)

    asyncio.run(scenario())
