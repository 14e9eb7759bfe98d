"""Requests of one turn of the event loop reach an engine together, and in the order of asking."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo.types import Rollout, SampleRequest
from orchestration.handles import RayRolloutWorker
from rollout_workers.config import RolloutConfig
from rollout_workers.turns import Gate, Together, Turn
from rollout_workers.worker import Engine, RolloutWorker
from tests.fakes import FakeEngine
from tests.unit.test_pool import requests


def test_what_is_asked_for_in_one_turn_is_handed_over_at_once() -> None:
    handed: list[list[int]] = []
    turn = Turn(handed.append)

    async def main() -> None:
        await asyncio.gather(turn.join([1, 2]), turn.join([]), turn.join([3]))
        await turn.join([4])
        await turn.join([])

    asyncio.run(main())
    assert handed == [[1, 2, 3], [4]]


@pytest.mark.parametrize("arrivals", list(itertools.permutations(range(3))))
def test_calls_that_arrive_one_by_one_go_on_in_one_turn_and_in_their_order(
    arrivals: tuple[int, ...],
) -> None:
    handed: list[list[int]] = []
    turn, gate = Turn(handed.append), Gate()

    async def call(place: int) -> None:
        await gate.passed(Together(turn=7, place=place, size=3))
        await turn.join([place])

    async def main() -> None:
        calls = []
        for place in arrivals:
            calls.append(asyncio.create_task(call(place)))
            for _ in range(3):  # turns of the loop
                await asyncio.sleep(0)
        await asyncio.gather(*calls)

    asyncio.run(main())
    assert handed == [[0, 1, 2]]


def test_a_turn_waits_for_its_own_calls_alone() -> None:
    async def main() -> None:
        gate = Gate()
        early = asyncio.create_task(gate.passed(Together(turn=0, place=0, size=2)))
        await gate.passed(Together(turn=1, place=0, size=1))
        assert not early.done()
        await gate.passed(Together(turn=0, place=1, size=2))
        await early

    asyncio.run(main())


class BatchingEngine(FakeEngine):
    """Notes which groups joined it together."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self._turn = Turn(self.batches.append)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        await self._turn.join([requests[0].group])
        return await super().sample(requests)


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_behind_an_actor_gets_the_groups_of_a_turn_as_they_were_asked_for(
    seed: int,
) -> None:
    rng, engine = random.Random(seed), BatchingEngine()
    worker = RolloutWorker("", RolloutConfig(), 64)
    worker._engine = cast(Engine, engine)

    def delivered(*arguments: Any) -> asyncio.Task[list[Rollout]]:
        """As Ray does: each call by itself, and in any order."""

        async def late() -> list[Rollout]:
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
            return await worker.sample(*arguments)

        return asyncio.create_task(late())

    actor = SimpleNamespace(sample=SimpleNamespace(remote=delivered))

    async def main() -> None:
        handle = RayRolloutWorker(cast(Any, actor))
        for groups in ([0, 1, 2, 3], [4, 5]):
            answers = await asyncio.gather(*[handle.sample(requests(group)) for group in groups])
            assert [len(rollouts) for rollouts in answers] == [2] * len(groups)

    asyncio.run(main())
    assert engine.batches == [[0, 1, 2, 3], [4, 5]]
