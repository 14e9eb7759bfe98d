"""Worker pools: least loaded first, retries elsewhere, healing, catching up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from grpo.engines import RolloutEngine, Scorer
from grpo.errors import Fatal, PromptTooLong, WorkerLost
from grpo.types import Group, SampleRequest, Sampling, Span, WeightRef
from orchestration.pool import ActorPool, RolloutPool
from orchestration.scorer_pool import ScorerPool
from orchestration.waits import Waits
from tests.fakes import FakeEngine, a_prompt


@dataclass
class EngineSpawner:
    """Hands out the engines it was given, then fresh ones."""

    ready: list[FakeEngine] = field(default_factory=list)
    made: list[FakeEngine] = field(default_factory=list)
    discarded: list[FakeEngine] = field(default_factory=list)

    async def spawn(self, place: int) -> RolloutEngine:
        engine = self.ready.pop(0) if self.ready else FakeEngine()
        self.made.append(engine)
        return engine

    async def discard(self, worker: RolloutEngine) -> None:
        assert isinstance(worker, FakeEngine)
        self.discarded.append(worker)


def a_pool(spawner: EngineSpawner, *, retries: int = 2, deadline_s: float = 5.0) -> RolloutPool:
    return RolloutPool(
        spawner,
        retries=retries,
        deadline_s=deadline_s,
        start_deadline_s=5.0,
        waits=Waits(),
    )


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


def test_a_lost_worker_is_replaced_and_the_same_requests_are_answered() -> None:
    async def scenario() -> None:
        dying = FakeEngine(failures=[WorkerLost("gone")])
        spawner = EngineSpawner(ready=[dying])
        pool = a_pool(spawner)
        await pool.pool.start(1)
        rollouts = await pool.sample(requests(3))
        expected = await FakeEngine().sample(requests(3))
        assert [r.text for r in rollouts] == [r.text for r in expected]
        assert spawner.discarded == [dying]
        assert pool.pool.num_replaced == 1

    asyncio.run(scenario())


def test_a_fresh_worker_loads_the_current_weights_before_it_serves() -> None:
    async def scenario() -> None:
        dying = FakeEngine()
        pool = a_pool(EngineSpawner(ready=[dying]))
        await pool.pool.start(1)
        await pool.load_weights(a_ref(5))
        dying.failures.append(WorkerLost("gone"))
        rollouts = await pool.sample(requests(0))
        assert {int(v) for r in rollouts for v in r.versions} == {5}

    asyncio.run(scenario())


def test_two_calls_on_one_dead_worker_replace_it_once() -> None:
    async def scenario() -> None:
        dying = FakeEngine(failures=[WorkerLost("gone"), WorkerLost("gone")])
        spawner = EngineSpawner(ready=[dying])
        pool = a_pool(spawner)
        await pool.pool.start(1)
        await asyncio.gather(pool.sample(requests(0)), pool.sample(requests(1)))
        assert len(spawner.made) == 2

    asyncio.run(scenario())


def test_a_worker_that_is_too_slow_is_replaced() -> None:
    async def scenario() -> None:
        hanging = FakeEngine(gate=asyncio.Event())
        spawner = EngineSpawner(ready=[hanging])
        pool = a_pool(spawner, deadline_s=0.05)
        await pool.pool.start(1)
        assert len(await pool.sample(requests(0))) == 2
        assert spawner.discarded == [hanging]

    asyncio.run(scenario())


def test_calls_go_to_the_least_loaded_worker() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        engines = [FakeEngine(gate=gate), FakeEngine(gate=gate)]
        pool = a_pool(EngineSpawner(ready=list(engines)))
        await pool.pool.start(2)
        calls = [asyncio.ensure_future(pool.sample(requests(group))) for group in range(4)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert [len({r.group for r in engine.asked}) for engine in engines] == [2, 2]
        gate.set()
        await asyncio.gather(*calls)

    asyncio.run(scenario())


def test_the_retry_budget_ends_the_run_with_the_last_failure() -> None:
    async def scenario() -> None:
        broken = [FakeEngine(failures=[WorkerLost(f"gone {n}")]) for n in range(3)]
        pool = a_pool(EngineSpawner(ready=list(broken)), retries=2)
        await pool.pool.start(1)
        with pytest.raises(Fatal, match=r"failed 3 times, last: gone 2"):
            await pool.sample(requests(0))

    asyncio.run(scenario())


def test_a_bad_request_is_not_retried() -> None:
    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine(failures=[PromptTooLong("no")])])
        pool = a_pool(spawner)
        await pool.pool.start(1)
        with pytest.raises(PromptTooLong):
            await pool.sample(requests(0))
        assert len(spawner.made) == 1

    asyncio.run(scenario())


def test_a_worker_that_dies_while_loading_is_replaced_and_loads_too() -> None:
    class DiesLoading(FakeEngine):
        async def load_weights(self, ref: WeightRef):  # type: ignore[no-untyped-def]
            raise WorkerLost("gone")

    async def scenario() -> None:
        spawner = EngineSpawner(ready=[FakeEngine(), DiesLoading()])
        pool = a_pool(spawner)
        await pool.pool.start(2)
        report = await pool.load_weights(a_ref(3))
        assert report.version == 3
        assert [engine.version for engine in spawner.made] == [3, 0, 3]

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
        pool: ActorPool[Scorer] = ActorPool(
            "scorer answer",
            Spawner(),
            retries=1,
            deadline_s=5.0,
            start_deadline_s=5.0,
            waits=Waits(),
        )
        await pool.start(1)
        spans = [Span(rollout=0, start=0, end=4), Span(rollout=1, start=0, end=4)]
        group = Group(id=0, prompt=a_prompt(0))
        scores = await ScorerPool("answer", pool).score(group, spans)
        assert [score.value for score in scores] == [None, None]
        assert all("scorer gone" in (score.failure or "") for score in scores)

    asyncio.run(scenario())
