"""Worker pools: least loaded first, retries elsewhere, healing beside the calls, catching up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from grpo.engines import RolloutEngine, Scorer
from grpo.errors import Fatal, PromptTooLong, Transient, WeightMismatch, WorkerLost
from grpo.types import Group, LoadReport, SampleRequest, Sampling, Span, WeightRef
from orchestration.scorer_pool import ScorerPool
from orchestration.waits import Waits
from tests.fakes import FakeEngine, a_prompt
from tests.unit.pool_setting import started_engines, started_pool


@dataclass
class EngineSpawner:
    """Hands out the engines it was given, then fresh ones; raises what it was given instead."""

    ready: list[FakeEngine] = field(default_factory=list)
    made: list[FakeEngine] = field(default_factory=list)
    discarded: list[FakeEngine] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)  # of the next spawns
    gate: asyncio.Event | None = None  # fresh ones wait for it

    async def spawn(self, place: int) -> RolloutEngine:
        if self.failures:
            raise self.failures.pop(0)
        if self.gate is not None and not self.ready:
            await self.gate.wait()
        engine = self.ready.pop(0) if self.ready else FakeEngine()
        self.made.append(engine)
        return engine

    async def discard(self, worker: RolloutEngine) -> None:
        assert isinstance(worker, FakeEngine)
        self.discarded.append(worker)


def requests(group: int, count: int = 2) -> list[SampleRequest]:
    prompt = a_prompt(group)
    return [
        SampleRequest(
            group=group,
            index=index,
            context=prompt.tokens,
            guidance=prompt.solution_tokens,
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8),
            seed=100 * group + index,
        )
        for index in range(count)
    ]


def a_ref(version: int) -> WeightRef:
    return WeightRef(version=version, num_bytes=0, checksum=version, location=None)


async def turns(count: int = 20) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_lost_worker_is_replaced_and_the_same_requests_are_answered() -> None:
    async def scenario() -> None:
        dying = FakeEngine(failures=[WorkerLost("gone")])
        spawner = EngineSpawner(ready=[dying])
        async with started_engines(spawner, 1) as pool:
            rollouts = await pool.sample(requests(3))
            expected = await FakeEngine().sample(requests(3))
            assert [r.text for r in rollouts] == [r.text for r in expected]
            assert spawner.discarded == [dying]
            assert pool.pool.num_replaced == 1

    asyncio.run(scenario())


def test_a_failed_call_goes_to_another_worker_while_its_own_is_replaced() -> None:
    async def scenario() -> None:
        dying, healthy = FakeEngine(failures=[WorkerLost("gone")]), FakeEngine()
        spawner = EngineSpawner(ready=[dying, healthy], gate=asyncio.Event())
        async with started_engines(spawner, 2) as pool:
            await pool.sample(requests(0))
            assert {r.group for r in healthy.asked} == {0}
            assert (pool.pool.sizes.ready, pool.pool.sizes.starting) == (1, 1)
            assert spawner.gate is not None
            spawner.gate.set()
            await turns()
            assert (pool.pool.sizes.ready, pool.pool.sizes.starting) == (2, 0)

    asyncio.run(scenario())


def test_a_fresh_worker_loads_the_current_weights_before_it_serves() -> None:
    async def scenario() -> None:
        dying = FakeEngine()
        async with started_engines(EngineSpawner(ready=[dying]), 1) as pool:
            await pool.load_weights(a_ref(5))
            dying.failures.append(WorkerLost("gone"))
            rollouts = await pool.sample(requests(0))
            assert {int(v) for r in rollouts for v in r.versions} == {5}

    asyncio.run(scenario())


class SlowLoading(FakeEngine):
    """Each load ends when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: dict[int, asyncio.Event] = {}

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        self.loads[ref.version] = asyncio.Event()
        await self.loads[ref.version].wait()
        return await super().load_weights(ref)


def test_weights_that_come_while_a_fresh_worker_catches_up_are_loaded_before_it_serves() -> None:
    async def scenario() -> None:
        late = SlowLoading()
        spawner = EngineSpawner(ready=[FakeEngine(), late])
        async with started_engines(spawner, 1) as pool:
            await pool.load_weights(a_ref(1))
            pool.pool.resize(2)
            await turns()
            await pool.load_weights(a_ref(2))  # does not wait for the one that starts
            late.loads[1].set()
            await turns()
            assert late.version == 1
            assert pool.pool.sizes.ready == 1
            late.loads[2].set()
            await turns()
            assert late.version == 2
            assert pool.pool.sizes.ready == 2

    asyncio.run(scenario())


def test_a_fresh_worker_with_damaged_weights_never_serves() -> None:
    class Damaged(FakeEngine):
        async def load_weights(self, ref: WeightRef) -> LoadReport:
            return LoadReport(version=ref.version, checksum=99, timings_s={})

    async def scenario() -> None:
        first = FakeEngine()
        async with started_engines(EngineSpawner(ready=[first, Damaged()]), 1) as pool:
            await pool.load_weights(a_ref(3))
            first.failures.append(WorkerLost("gone"))
            with pytest.raises(WeightMismatch):
                await pool.sample(requests(0))

    asyncio.run(scenario())


def test_two_calls_on_one_dead_worker_replace_it_once() -> None:
    async def scenario() -> None:
        dying = FakeEngine(failures=[WorkerLost("gone"), WorkerLost("gone")])
        spawner = EngineSpawner(ready=[dying])
        async with started_engines(spawner, 1) as pool:
            await asyncio.gather(pool.sample(requests(0)), pool.sample(requests(1)))
            assert len(spawner.made) == 2

    asyncio.run(scenario())


def test_a_worker_that_is_too_slow_is_replaced() -> None:
    async def scenario() -> None:
        hanging = FakeEngine(gate=asyncio.Event())
        spawner = EngineSpawner(ready=[hanging])
        async with started_engines(spawner, 1, deadline_s=0.05) as pool:
            assert len(await pool.sample(requests(0))) == 2
            assert spawner.discarded == [hanging]

    asyncio.run(scenario())


def test_calls_go_to_the_least_loaded_worker() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        engines = [FakeEngine(gate=gate), FakeEngine(gate=gate)]
        async with started_engines(EngineSpawner(ready=list(engines)), 2) as pool:
            calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(4)]
            await turns()
            assert [len({r.group for r in engine.asked}) for engine in engines] == [2, 2]
            gate.set()
            await asyncio.gather(*calls)

    asyncio.run(scenario())


def test_the_retry_budget_ends_the_run_with_the_last_failure() -> None:
    async def scenario() -> None:
        broken = [FakeEngine(failures=[WorkerLost(f"gone {n}")]) for n in range(3)]
        async with started_engines(EngineSpawner(ready=list(broken)), 1, retries=2) as pool:
            with pytest.raises(Fatal, match=r"failed 3 times, last: gone 2"):
                await pool.sample(requests(0))

    asyncio.run(scenario())


def test_a_bad_request_is_not_retried() -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine(failures=[PromptTooLong("no")])])
        async with started_engines(spawner, 1) as pool:
            with pytest.raises(PromptTooLong):
                await pool.sample(requests(0))
            assert len(spawner.made) == 1

    asyncio.run(scenario())


class DiesLoading(FakeEngine):
    async def load_weights(self, ref: WeightRef) -> LoadReport:
        raise WorkerLost("gone")


@pytest.mark.parametrize("others", [0, 1])
def test_a_worker_that_dies_while_loading_is_replaced_and_loads_too(others: int) -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[*[FakeEngine() for _ in range(others)], DiesLoading()])
        async with started_engines(spawner, 1 + others) as pool:
            report = await pool.load_weights(a_ref(3))
            assert report.version == 3
            await turns()
            assert [engine.version for engine in spawner.made] == [3] * others + [0, 3]

    asyncio.run(scenario())


def test_a_place_that_cannot_be_filled_costs_a_remark_and_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestration.pool.FIRST_PAUSE_S", 0.001)

    async def scenario() -> list[str]:
        told: list[str] = []
        waits = Waits(on_trouble=told.append)
        dying = FakeEngine(failures=[WorkerLost("gone")])
        spawner = EngineSpawner(ready=[dying, FakeEngine()])
        async with started_engines(spawner, 2, waits=waits) as pool:
            spawner.failures += [Transient("no node has room") for _ in range(3)]
            await pool.sample(requests(0))
            while pool.pool.sizes.ready < 2:
                await pool.sample(requests(1))
            assert len(spawner.made) == 3
        return told

    told = asyncio.run(scenario())
    assert told == [
        "rollout worker 0 is replaced: gone",
        "rollout worker 0 cannot be started and is tried again: no node has room",
        "rollout worker 0 has been started after all",
    ]


def test_a_pool_without_a_worker_for_too_long_ends_the_run_with_the_reason() -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine(failures=[WorkerLost("gone")])])
        async with started_engines(spawner, 1, start_deadline_s=0.05) as pool:
            spawner.failures += [Transient("no node has room")]
            with pytest.raises(Fatal) as raised:
                await pool.sample(requests(0))
            assert "no rollout worker is left" in str(raised.value)
            assert "rollout worker 0 has not answered" in str(raised.value)
            assert "no node has room" in str(raised.value)

    asyncio.run(scenario())


def test_a_replacement_that_is_broken_for_good_ends_the_run_with_its_reason() -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine(failures=[WorkerLost("gone")])])
        async with started_engines(spawner, 1) as pool:
            spawner.failures += [Fatal("the model's folder is gone")]
            with pytest.raises(Fatal, match="folder is gone"):
                await pool.sample(requests(0))

    asyncio.run(scenario())


def test_a_scorer_whose_budget_is_used_up_gives_failures_and_no_number() -> None:
    class Broken:
        async def score(self, group: Group, spans: list[Span]) -> list[object]:
            raise WorkerLost("scorer gone")

    class Spawner:
        async def spawn(self, place: int) -> Scorer:
            return Broken()  # type: ignore[return-value]

        async def discard(self, worker: Scorer) -> None:
            pass

    async def scenario() -> None:
        async with started_pool(Spawner(), 1, role="scorer answer", retries=1) as pool:
            spans = [Span(rollout=0, start=0, end=4), Span(rollout=1, start=0, end=4)]
            group = Group(id=0, prompt=a_prompt(0))
            scores = await ScorerPool("answer", pool).score(group, spans)
            assert [score.value for score in scores] == [None, None]
            assert all("scorer gone" in (score.failure or "") for score in scores)

    asyncio.run(scenario())
