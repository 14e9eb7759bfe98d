"""Admission slots: back-pressure, order, window and staleness by counting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from orchestration.buffer import Closed, GroupBuffer, num_slots


async def settled() -> None:
    """Let everything that can run without new input run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def is_blocked(awaitable: Awaitable[object]) -> bool:
    """Whether the awaitable is still waiting once everything else has settled."""
    task = asyncio.ensure_future(awaitable)
    await settled()
    blocked = not task.done()
    task.cancel()
    return blocked


def buffer(slots: int = 4, window: int = 1, limit: int = 100) -> GroupBuffer[str]:
    return GroupBuffer(slots=slots, window=window, limit=limit)


def test_no_group_is_admitted_without_a_free_slot() -> None:
    async def scenario() -> None:
        queue = buffer(slots=2)
        assert [await queue.admit(), await queue.admit()] == [0, 1]
        assert await is_blocked(queue.admit())

    asyncio.run(scenario())


def test_a_taken_group_keeps_its_slot_until_release() -> None:
    async def scenario() -> None:
        queue = buffer(slots=1)
        await queue.finish(await queue.admit(), "a")
        assert await queue.take(1) == ["a"]
        assert await is_blocked(queue.admit())
        await queue.release(1)
        assert await queue.admit() == 1

    asyncio.run(scenario())


def test_dropped_group_frees_its_slot_at_once_and_is_replaced() -> None:
    async def scenario() -> None:
        queue = buffer(slots=2, limit=2)
        await queue.admit()
        await queue.admit()
        await queue.drop(0)
        assert await queue.admit() == 2
        await queue.finish(2, "c")
        await queue.finish(1, "b")
        assert await queue.take(2) == ["b", "c"]

    asyncio.run(scenario())


def test_groups_are_handed_out_in_admission_order_whatever_the_order_of_finishing() -> None:
    async def scenario() -> None:
        queue = buffer()
        for _ in range(4):
            await queue.admit()
        for group in (3, 1, 2):
            await queue.finish(group, str(group))
        assert await is_blocked(queue.take(2))  # 0 is older and not finished
        await queue.finish(0, "0")
        assert await queue.take(2) == ["0", "1"]
        assert await queue.take(2) == ["2", "3"]

    asyncio.run(scenario())


def test_a_group_is_overtaken_by_window_minus_one_younger_ones_in_its_whole_life() -> None:
    async def scenario() -> None:
        queue = buffer(slots=6, window=3)
        for _ in range(6):
            await queue.admit()
        for group in (1, 2, 3, 4):
            await queue.finish(group, str(group))
        assert await queue.take(2) == ["1", "2"]  # both pass group 0
        assert await is_blocked(queue.take(2))
        await queue.finish(0, "0")
        assert await queue.take(2) == ["0", "3"]

    asyncio.run(scenario())


def test_nothing_is_admitted_beyond_what_the_run_can_still_train_on() -> None:
    async def scenario() -> None:
        queue = buffer(slots=10, limit=3)
        for group in range(3):
            await queue.finish(await queue.admit(), str(group))
        assert await is_blocked(queue.admit())

    asyncio.run(scenario())


def test_pending_groups_of_an_earlier_run_come_first_and_ids_continue_after_it() -> None:
    async def scenario() -> None:
        queue: GroupBuffer[str] = GroupBuffer(
            slots=4, window=1, limit=4, next_group=9, pending=[5, 7]
        )
        assert [await queue.admit() for _ in range(4)] == [5, 7, 9, 10]
        assert queue.unfinished == [5, 7, 9, 10]
        assert queue.next_group == 11

    asyncio.run(scenario())


def test_closing_wakes_everybody_who_waits() -> None:
    async def scenario() -> None:
        queue = buffer(slots=0)
        waiting = [asyncio.ensure_future(queue.admit()), asyncio.ensure_future(queue.take(1))]
        await settled()
        await queue.close()
        for task in waiting:
            with pytest.raises(Closed):
                await task

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("bound", "window"), [(0, 1), (0, 3), (1, 1), (2, 1), (1, 2), (1, 3), (1, 4), (1, 9), (2, 4)]
)
def test_age_never_exceeds_the_bound(bound: int, window: int) -> None:
    """With one straggler per step, counted by simulation."""
    groups, steps = 3, 12
    slots = num_slots(groups, max_staleness=bound, window=window)
    assert slots >= groups

    async def scenario() -> int:
        queue: GroupBuffer[int] = GroupBuffer(slots=slots, window=window, limit=groups * steps)
        version, born, worst, unfinished = 0, {}, 0, []

        async def admit_all() -> None:
            while True:
                try:
                    group = await queue.admit()
                except Closed:
                    return
                born[group] = version
                unfinished.append(group)

        admitting = asyncio.ensure_future(admit_all())
        for _ in range(steps):
            await settled()
            while len(queue._takeable(groups)) < groups:
                group = unfinished.pop(-1 if len(unfinished) > 1 else 0)  # newest first
                await queue.finish(group, group)
            for group in await queue.take(groups):
                worst = max(worst, version - born[group])
            version += 1
            await queue.release(groups)
        await queue.close()
        await admitting
        return worst

    assert asyncio.run(scenario()) <= bound
