"""Who takes part in a broadcast of weights, and what becomes of those that it does not reach."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from grpo.errors import Fatal, StreamBroken, Transient, WorkerLost
from grpo.weight_group import WeightGroup
from grpo.weight_stream import WeightStream
from orchestration.waits import Waits
from orchestration.weight_broadcast import Circle, WeightBroadcast


class FakeReceiver:
    """Is sent what it does not fail at; remembers it until it is told to forget."""

    def __init__(self, *, has_loaded: bool = True, device: str | None = "node-a 0") -> None:
        self.has_loaded = has_loaded
        self.own_device = device  # None: it is lost
        self.error: Exception | None = None
        self.hangs = False
        self.streams: list[WeightStream] = []

    async def device(self) -> str:
        if self.own_device is None:
            raise WorkerLost("its process has ended")
        return self.own_device

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

    def __init__(self, *workers: FakeReceiver, devices: Sequence[str] = (), size: int = 2) -> None:
        """`devices` of the learner's ranks, which send to their own; none: rank 0 sends to all."""
        self.workers = list(workers)
        self.own_devices = list(devices)
        self.num_meetings = 0
        self.troubles: list[str] = []
        self.broadcast = WeightBroadcast(
            lambda: self.workers,
            processes_per_worker=size,
            deadline_s=0.05,
            is_local=bool(devices),
        )
        self.waits = Waits(self.troubles.append)

    async def devices(self) -> list[str]:
        return self.own_devices

    async def meet(self, rank: int) -> tuple[str, int]:
        self.num_meetings += 1
        return f"host of rank {rank}", self.num_meetings

    def publish(self, version: int) -> list[WeightGroup]:
        return [circle.group for circle in self.publish_in_circles(version)]

    def publish_in_circles(self, version: int) -> list[Circle]:
        async def main() -> list[Circle]:
            circles = await self.broadcast.circles(self)
            await self.broadcast.received(version)
            return circles

        return asyncio.run(self.waits.within(10, "driver: syncing", main()))


def test_all_workers_that_have_weights_are_one_group_as_long_as_they_stay() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver())
    (group,) = setting.publish(1)
    assert group == WeightGroup(host="host of rank 0", port=1, size=5)  # rank 0, and twice two
    assert setting.publish(2) == [group]
    streams = [stream for worker in setting.workers for stream in worker.streams]
    assert [(s.first_rank, s.version, s.group) for s in streams] == [(1, 2, group), (3, 2, group)]
    assert setting.troubles == []


def test_a_worker_without_weights_waits_for_its_first_ones_from_the_object_store() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver(has_loaded=False))
    (group,) = setting.publish(1)
    assert group.size == 3
    setting.workers[1].has_loaded = True
    assert setting.publish(2) == [WeightGroup(host="host of rank 0", port=2, size=5)]


def test_nobody_meets_before_anybody_has_weights() -> None:
    setting = Setting(FakeReceiver(has_loaded=False))
    assert setting.publish(0) == []
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
    assert "version 1 did not reach 1 of 2 rollout workers directly" in trouble
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


def test_every_rank_sends_to_the_workers_on_its_own_gpu() -> None:
    first, second, third = (FakeReceiver(device=f"node-a {gpu}") for gpu in (1, 0, 1))
    setting = Setting(first, second, third, devices=["node-a 0", "node-a 1", "node-b 0"], size=1)
    circles = {c.rank: c for c in setting.publish_in_circles(1)}
    assert {rank: list(c.workers) for rank, c in circles.items()} == {
        0: [second],
        1: [first, third],
    }
    assert circles[1].group == WeightGroup(host="host of rank 1", port=1, size=3, is_local=True)
    assert [w.streams[0].first_rank for w in (first, second, third)] == [1, 1, 2]
    assert setting.troubles == []


def test_ranks_of_one_device_leave_the_workers_there_to_the_first() -> None:
    setting = Setting(FakeReceiver(), FakeReceiver(), devices=["node-a 0", "node-a 0"], size=1)
    assert [c.rank for c in setting.publish_in_circles(1)] == [0]


def test_a_worker_that_shares_no_gpu_or_is_lost_is_left_to_the_object_store() -> None:
    near, far, lost = (FakeReceiver(device=d) for d in ("node-a 0", "node-b 0", None))
    setting = Setting(near, far, lost, devices=["node-a 0"], size=1)
    (group,) = setting.publish(1)
    assert group.size == 2 and near.streams and not far.streams
    (trouble,) = setting.troubles
    assert "2 of 3 rollout workers are on no device of a learner rank" in trouble
    assert setting.publish(2) == [group] and len(setting.troubles) == 1
