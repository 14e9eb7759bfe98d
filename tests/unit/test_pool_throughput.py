"""The real driver and pools in simulated time: throughput follows the size, and nothing is lost."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from orchestration.pool import ActorPool
from orchestration.simulation.clock import SimulatedLoop
from orchestration.simulation.roles import EngineSpawner
from orchestration.simulation.services import ServiceCpu, Services
from tests.unit.driver_setting import Setting, a_schedule
from tests.unit.pool_setting import started_engines

STEPS, GROUPS = 18, 4
LONG = 1e6  # simulated seconds, which cost nothing
# A group of 4 rollouts takes all places of a worker for 8 tokens at a token a second: 8 s.
GROUP_S = 8.0
SERVICES = Services(
    tokens_per_s=1.0,
    places=4,
    lengths=((8,),),
    prompt_tokens=2,
    scorer_s=0.0,
    constant_share=0.0,
    learner_tokens_per_s=1.0,
    publish_s=0.0,
    load_s=0.0,
)
SCHEDULE = a_schedule(
    steps=STEPS,
    groups_per_step=GROUPS,
    checkpoint_every=1,
    take_deadline_s=LONG,
    train_deadline_s=LONG,
    sync_deadline_s=LONG,
)


def trained_groups(setting: Setting) -> list[int]:
    return [done.group.id for step in setting.journal.steps for done in step.groups]


def test_a_step_takes_as_long_as_its_groups_take_on_the_workers_there_are() -> None:
    ended: list[float] = []  # seconds at which the steps ended

    async def scenario() -> Setting:
        spawner = EngineSpawner(SERVICES, ServiceCpu(), 8)
        async with started_engines(spawner, 1, deadline_s=LONG, start_deadline_s=LONG) as pool:
            setting = Setting(SCHEDULE, pool=pool)

            def resize(progress: object) -> None:
                ended.append(asyncio.get_running_loop().time())
                sizes = {6: 4, 12: 2}  # by step
                if len(ended) in sizes:
                    pool.pool.resize(sizes[len(ended)])

            setting.after_checkpoint = resize
            assert await setting.driver.run()
            assert (pool.pool.sizes.ready, pool.pool.num_replaced) == (2, 0)
            return setting

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        setting = runner.run(scenario())
    lasted = [after - before for before, after in pairwise(ended)]
    # Steps 2 to 6; 8 to 12; 14 to 18: the step behind a change may have begun before it.
    assert lasted[0:5] == pytest.approx([GROUPS * GROUP_S] * 5)
    assert lasted[6:11] == pytest.approx([GROUPS * GROUP_S / 4] * 5)
    assert lasted[12:17] == pytest.approx([GROUPS * GROUP_S / 2] * 5)
    assert trained_groups(setting) == list(range(STEPS * GROUPS))


async def _resized_again_and_again(pool: ActorPool[object], every_s: float) -> None:
    """Waits for the clock alone; ended with the run."""
    while True:
        for size in (4, 2, 5, 1, 3):
            await asyncio.sleep(every_s)
            pool.resize(size)


@pytest.mark.parametrize("every_s", [3.0, 7.0, 29.0])
def test_sizes_that_change_in_the_middle_of_generations_lose_no_group(every_s: float) -> None:
    schedule = a_schedule(
        steps=STEPS,
        groups_per_step=GROUPS,
        max_staleness=1,
        take_deadline_s=LONG,
        train_deadline_s=LONG,
        sync_deadline_s=LONG,
    )

    async def scenario() -> Setting:
        spawner = EngineSpawner(SERVICES, ServiceCpu(), 8)
        async with (
            started_engines(spawner, 1, deadline_s=LONG, start_deadline_s=LONG) as pool,
            asyncio.TaskGroup() as tasks,
        ):
            setting = Setting(schedule, pool=pool)
            resizing = tasks.create_task(_resized_again_and_again(pool.pool, every_s))
            assert await setting.driver.run()
            resizing.cancel()
            assert len(spawner.engines) > 1
            assert pool.pool.num_replaced == 0
            return setting

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        setting = runner.run(scenario())
    assert trained_groups(setting) == list(range(STEPS * GROUPS))
    assert max(step.metrics["staleness/max"] for step in setting.journal.steps) <= 1
