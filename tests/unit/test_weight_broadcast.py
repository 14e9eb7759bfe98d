"""Who takes part in a broadcast of weights, and what becomes of those that it does not reach."""

from __future__ import annotations

import asyncio

import pytest

from grpo.errors import Fatal, StreamBroken, Transient
from grpo.weight_stream import WeightGroup, WeightStream
from orchestration.waits import Waits
from orchestration.weight_broadcast import WeightBroadcast


class FakeReceiver:
    """Is sent what it does not fail at; remembers it until it is told to forget."""

    def __init__(self, *, has_loaded: bool = True) -> None:
        self.has_loaded = has_loaded
        self.error: Exception | None = None
        self.hangs = False
        self.streams: list[WeightStream] = []

    async def receive_weights(self, stream: WeightStream) -> None:
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        self.streams.append(stream)

    def forget_received(self) -> None:
        self.streams.clear()


class Setting:
    """A broadcast over workers of two processes each, and what it asked for and said."""

    def __init__(self, *workers: FakeReceiver) -> None:
        self.workers = list(workers)
        self.num_meetings = 0
        self.troubles: list[str] = []
        self.broadcast = WeightBroadcast(
            lambda: self.workers, processes_per_worker=2, deadline_s=0.05
        )
        self.waits = Waits(self.troubles.append)

    async def meet(self) -> tuple[str, int]:
        self.num_meetings += 1
        return "host", self.num_meetings

    def publish(self, version: int) -> WeightGroup | None:
        async def main() -> WeightGroup | None:
            group = await self.broadcast.group(self.meet)
            if group is not None:
                await self.broadcast.received(group, version)
            return group

        return asyncio.run(self.waits.within(10, "driver: syncing", main()))


def test_all_workers_that_have_weights_are_one_group_as_long_as_they_stay() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver())
    group = setting.publish(1)
    assert group == WeightGroup(host="host", port=1, size=5)  # rank 0, and twice two
    assert setting.publish(2) == group
    streams = [stream for worker in setting.workers for stream in worker.streams]
    assert [(s.first_rank, s.version, s.group) for s in streams] == [(1, 2, group), (3, 2, group)]
    assert setting.troubles == []


def test_a_worker_without_weights_waits_for_its_first_ones_from_the_object_store() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver(has_loaded=False))
    group = setting.publish(1)
    assert group is not None and group.size == 3
    setting.workers[1].has_loaded = True
    assert setting.publish(2) == WeightGroup(host="host", port=2, size=5)


def test_nobody_meets_before_anybody_has_weights() -> None:
    setting = Setting(FakeReceiver(has_loaded=False))
    assert setting.publish(0) is None
    assert setting.num_meetings == 0


def test_a_replaced_worker_and_a_new_learner_mean_a_new_group() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver())
    setting.publish(1)
    setting.workers[1] = FakeReceiver()
    setting.publish(2)
    setting.broadcast.forget()
    setting.publish(3)
    assert setting.num_meetings == 3


@pytest.mark.parametrize("kind", [StreamBroken, Transient])
def test_whom_it_does_not_reach_is_told_of_once_and_the_group_meets_again(
    kind: type[Transient],
) -> None:
    setting = Setting(FakeReceiver(), FakeReceiver())
    setting.workers[0].error = kind("a peer closed the connection")
    setting.publish(1)
    (trouble,) = setting.troubles
    assert "version 1 did not reach 1 of 2 rollout workers by broadcast" in trouble
    assert "from the object store: a peer closed the connection" in trouble
    setting.workers[0].error = None
    setting.publish(2)
    assert setting.num_meetings == 2
    assert len(setting.troubles) == 1


def test_a_worker_that_hangs_is_not_waited_for_beyond_the_deadline() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver())
    setting.workers[1].hangs = True
    setting.publish(1)
    (trouble,) = setting.troubles
    assert "did not reach 1 of 2" in trouble and "not answered for 0.05 s" in trouble


def test_a_bug_is_not_taken_for_a_lost_worker() -> None:
    setting = Setting(FakeReceiver())
    setting.workers[0].error = Fatal("KeyError: 'model.norm.weight'")
    with pytest.raises(Fatal, match="KeyError"):
        setting.publish(1)


def test_what_was_received_before_is_forgotten_although_nobody_takes_part() -> None:
    """After a lost learner a version of the same number may hold other weights."""
    setting = Setting(FakeReceiver())
    setting.publish(1)
    worker = setting.workers[0]
    worker.has_loaded = False
    setting.publish(1)
    assert worker.streams == []
