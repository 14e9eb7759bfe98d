"""Show 4 of a hang: whoever never answers is named within the deadline, first and with reasons."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from grpo.engines import RolloutEngine
from grpo.errors import DeadlineExceeded, Stalled
from grpo.types import (
    Group,
    LoadReport,
    Rollout,
    SampleRequest,
    Score,
    Span,
    StepReport,
    TrainBatch,
    WeightRef,
)
from orchestration.evaluation import EvalReport, evaluate
from orchestration.rollout_pool import RolloutPool
from orchestration.scorer_pool import ScorerPool, ScorerWorker
from orchestration.waiting import Whereabouts
from orchestration.waits import Waits, note_whereabouts, waiting_for
from tests.fakes import FakeEngine, FakeLearner, FakeScorer, a_prompt
from tests.unit.driver_setting import SAMPLING, Setting, a_schedule, root
from tests.unit.pool_setting import started_engines, started_pool

NEVER = 30.0  # longer than the test may take
SOON = 0.3


class HangingEngine(FakeEngine):
    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        await asyncio.Event().wait()
        raise AssertionError("never")


class HangingScorer(FakeScorer):
    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def statistics(self) -> Mapping[str, float]:
        return {}


@dataclass
class Spawner:
    """Hands out these engines first, then ones that answer; the log of each is a file."""

    first: list[FakeEngine]
    log: Path | None = None
    num_discarded: int = 0

    async def spawn(self, place: int) -> RolloutEngine:
        if self.log is not None:
            note_whereabouts(Whereabouts(pid=100 + place, node="here", logs=(str(self.log),)))
        return self.first.pop(0) if self.first else FakeEngine()

    async def discard(self, worker: RolloutEngine) -> None:
        self.num_discarded += 1


class ScorerSpawner:
    async def spawn(self, place: int) -> ScorerWorker:
        return HangingScorer()

    async def discard(self, worker: ScorerWorker) -> None: ...


def failure_of(scenario: object) -> BaseException:
    with pytest.raises(BaseException) as raised:  # the caller looks at the root
        asyncio.run(scenario)  # type: ignore[arg-type]  # a coroutine
    return root(raised.value)


def test_a_rollout_worker_that_never_answers_is_named_before_those_who_wait_for_it(
    tmp_path: Path,
) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\n" + "".join(f"line {number}\n" for number in range(20)))

    async def scenario() -> None:
        waits = Waits()
        spawner = Spawner([FakeEngine(), HangingEngine()], log)
        schedule = a_schedule(take_deadline_s=SOON)
        async with started_engines(spawner, 2, waits=waits, deadline_s=NEVER) as pool:
            await Setting(schedule, pool=pool, waits=waits).driver.run()

    error = failure_of(scenario())
    assert isinstance(error, Stalled)
    lines = str(error).splitlines()
    assert lines[0].startswith("rollout worker 1 has not answered for ")
    assert "asked last: sampling 4 rollouts of group 1" in lines[0]
    assert lines[1:4] == [f"  last lines of {log}:", "    line 15", "    line 16"]
    chain = next(line for line in lines if "who waits for whom" in line)
    places = [chain.index(name) for name in ("the run", "buffer", "group 1", "rollout worker 1")]
    assert places == sorted(places)


def test_a_worker_that_passes_its_deadline_is_replaced_and_named_and_the_run_finishes() -> None:
    told: list[str] = []

    async def scenario() -> bool:
        waits = Waits(on_trouble=told.append)
        spawner = Spawner([HangingEngine()])
        async with started_engines(spawner, 1, waits=waits, deadline_s=SOON) as pool:
            finished = await Setting(a_schedule(steps=1), pool=pool, waits=waits).driver.run()
            return finished and spawner.num_discarded == 1

    assert asyncio.run(scenario())
    assert len(told) == 1  # though three groups waited for it
    assert told[0].startswith("rollout worker 0 is replaced: rollout worker 0 has not answered")


class NeverLoading(FakeEngine):
    async def load_weights(self, ref: WeightRef) -> LoadReport:
        await asyncio.Event().wait()
        raise AssertionError("never")


def test_a_rollout_worker_that_never_ends_loading_weights_is_named() -> None:
    async def scenario() -> None:
        waits = Waits()
        spawner = Spawner([FakeEngine(), NeverLoading()])
        schedule = a_schedule(sync_deadline_s=SOON)
        async with started_engines(spawner, 2, waits=waits, deadline_s=NEVER) as pool:
            await Setting(schedule, pool=pool, waits=waits).driver.run()

    first = str(failure_of(scenario())).splitlines()[0]
    assert first.startswith("rollout worker 1 has not answered")
    assert first.endswith("asked last: loading version 1")


async def evaluated(pool: RolloutPool, waits: Waits) -> EvalReport:
    with waits.noted("evaluation: step 3"):
        return await evaluate(
            pool,
            FakeScorer(),
            [a_prompt(0), a_prompt(1)],
            samples=2,
            sampling=SAMPLING,
            seed=0,
            first_group=100,
            concurrency=1,
        )


def test_a_rollout_worker_that_hangs_in_an_evaluation_is_named_with_what_waits_for_it() -> None:
    told: list[str] = []

    async def scenario() -> EvalReport:
        waits = Waits(on_trouble=told.append)
        async with started_engines(
            Spawner([HangingEngine()]), 1, waits=waits, deadline_s=SOON
        ) as pool:
            return await evaluated(pool, waits)

    report = asyncio.run(scenario())
    assert report.overall.num_prompts == 2  # the one in its stead has answered
    assert len(told) == 1
    assert told[0].startswith("rollout worker 0 is replaced: rollout worker 0 has not answered")


def test_an_evaluation_in_which_every_worker_hangs_ends_with_the_first_of_them() -> None:
    async def scenario() -> None:
        waits = Waits()
        spawner = Spawner([HangingEngine() for _ in range(3)])
        async with started_engines(spawner, 1, waits=waits, deadline_s=SOON) as pool:
            await evaluated(pool, waits)

    text = str(failure_of(scenario()))
    assert "rollout worker 0 has not answered" in text.splitlines()[0]
    chain = next(line for line in text.splitlines() if "who waits for whom" in line)
    assert chain.index("evaluation (step 3") < chain.index("rollout worker 0")


def test_a_scorer_that_never_answers_is_named() -> None:
    async def scenario() -> None:
        waits = Waits()
        async with started_pool(
            ScorerSpawner(), 1, role="scorer steps", retries=0, deadline_s=NEVER, waits=waits
        ) as actors:
            pool = ScorerPool("steps", actors)

            class Pooled(FakeScorer):
                async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
                    return await pool.score(group, spans)

            schedule = a_schedule(take_deadline_s=SOON)
            await Setting(schedule, scorer=Pooled(), waits=waits).driver.run()

    first = str(failure_of(scenario())).splitlines()[0]
    assert first.startswith("scorer steps 0 has not answered")
    assert "asked last: scoring group 0" in first


@dataclass
class HangingLearner(FakeLearner):
    """Its rank 1 never ends what `hangs` names."""

    hangs: str = "train"

    async def train(self, batch: TrainBatch) -> StepReport:
        if self.hangs == "train":
            await self._both()
        return await super().train(batch)

    async def publish(self, version: int) -> WeightRef:
        if self.hangs == "publish":
            await self._both()
        return await super().publish(version)

    async def _both(self) -> None:
        ended = asyncio.Event()
        ended.set()
        await asyncio.gather(
            waiting_for("learner rank 0", ended.wait()),
            waiting_for("learner rank 1", asyncio.Event().wait()),
        )


@pytest.mark.parametrize(
    ("hangs", "asked"), [("train", "step 1"), ("publish", "publishing version 1")]
)
def test_the_learner_rank_that_never_answers_is_named(hangs: str, asked: str) -> None:
    schedule = a_schedule(train_deadline_s=SOON, sync_deadline_s=SOON)
    error = failure_of(Setting(schedule, learner=HangingLearner(hangs=hangs)).driver.run())
    assert isinstance(error, DeadlineExceeded)
    first = str(error).splitlines()[0]
    assert first.startswith("learner rank 1 has not answered")
    assert first.endswith(f"asked last: {asked}")


def test_a_wait_that_ends_in_time_leaves_nothing_open_and_its_time_out_is_its_own() -> None:
    async def scenario() -> None:
        waits = Waits()

        async def answer() -> str:
            assert [wait.owner for wait in waits.open] == ["learner"]
            return "done"

        assert await waits.within(NEVER, "learner: step 1", answer()) == "done"
        assert waits.open == []

        async def times_out() -> None:
            raise TimeoutError("the socket")

        with pytest.raises(DeadlineExceeded, match="learner: step 2: the socket"):
            await waits.within(NEVER, "learner: step 2", times_out())
        assert waits.open == []

    asyncio.run(scenario())
