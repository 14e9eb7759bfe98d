"""covey scale: what it refuses, what a running job makes of it, what outlives the job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import Fatal, UserError
from orchestration.cli import main
from orchestration.config import Recipe, load_recipe
from orchestration.live_pools import pools_kept
from orchestration.placement import Room, lack_of_room
from orchestration.places import PoolSizes
from orchestration.scaling import (
    POOLS_FILE,
    PoolsRecord,
    ask,
    at_asked_sizes,
    at_sizes,
    parsed_sizes,
    read_pools,
    read_request,
    sizes_of,
)
from tests.unit.pool_setting import started_pool
from tests.unit.small_project import settings, written_project
from tests.unit.test_pool import EngineSpawner

PLENTY = Room(cpus=100, gpus=8, free_cpus=90, free_gpus=8)
DEEPSPEED = {"learning_rate": 1e-4, "zero_stage": 2}


def a_recipe(folder: Path, **changed: Any) -> Recipe:
    return load_recipe(written_project(folder, **changed), [])


@dataclass
class Ranks:
    """A learner that has what it is asked for at once, or never."""

    num_ranks: int = 1
    ranks_setback: str | None = None
    is_restarting: bool = False
    refuses: str | None = None
    asked: list[int] = field(default_factory=list)

    def request_ranks(self, ranks: int) -> None:
        self.asked.append(ranks)
        self.ranks_setback = self.refuses
        if self.refuses is None:
            self.num_ranks = ranks


@dataclass
class Job:
    """A running job with real pools of one role, and what it says."""

    run: Path
    recipe: Recipe
    spawner: EngineSpawner = field(default_factory=EngineSpawner)
    ranks: Ranks = field(default_factory=Ranks)
    room: Room | None = PLENTY
    said: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self, size: int = 1) -> AsyncIterator[None]:
        async with (
            started_pool(self.spawner, size) as rollout,
            started_pool(EngineSpawner(), 1, role="scorer answer") as answer,
            pools_kept(
                self.run,
                self.recipe,
                {"rollout": rollout, "answer": answer},
                self.ranks,
                room=None if self.room is None else lambda: self.room or PLENTY,
                say=self.said.append,
            ),
        ):
            await self.told()
            yield

    async def told(self) -> PoolsRecord:
        """What the folder says when the last request has been heard and all pools are quiet."""
        while True:
            found, request = read_pools(self.run), read_request(self.run)
            is_heard = found is not None and (request is None or found.request == request.id)
            if is_heard and all(p.starting + p.leaving == 0 for p in found.pools.values()):
                return found
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.live_pools.EVERY_S", 0.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rolout=2", "this run has no role 'rolout'; did you mean rollout?"),
        ("judges=2", "this run has no role 'judges'; roles: rollout, answer, learner"),
        ("rollout", "expected a whole number from 1 on, for example rollout=2"),
        ("rollout=", "expected a whole number from 1 on"),
        ("rollout=0", "expected a whole number from 1 on"),
        ("answer=-1", "expected a whole number from 1 on"),
        ("answer=two", "expected a whole number from 1 on"),
        ("learner=2", "backend torch runs on one rank, but ranks is 2"),
    ],
)
def test_what_is_no_size_of_a_role_is_refused_in_one_line(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(UserError) as raised:
        parsed_sizes([text], a_recipe(tmp_path))
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_role_that_is_named_twice_and_more_ranks_than_rollouts_are_refused(
    tmp_path: Path,
) -> None:
    recipe = a_recipe(tmp_path, learner=DEEPSPEED)
    with pytest.raises(UserError, match="rollout is given twice"):
        parsed_sizes(["rollout=2", "rollout=3"], recipe)
    with pytest.raises(UserError, match="an update has only 32 rollouts"):
        parsed_sizes(["learner=33"], recipe)
    assert parsed_sizes(["learner=2", "answer=3"], recipe) == {"learner": 2, "answer": 3}


def test_a_scorer_that_learns_has_one_actor(tmp_path: Path) -> None:
    learning = {
        "name": "prime",
        "implicit_reward": {"model": "model", "outcome": "answer"},
    }
    recipe = Recipe.model_validate(
        settings(scorers=[{"name": "answer", "rule": "numeric"}, learning])
    )
    with pytest.raises(UserError, match="'prime' learns and has 2 actors"):
        parsed_sizes(["prime=2"], recipe)


@pytest.mark.parametrize("name", ["rollout", "learner"])
def test_no_scorer_has_the_name_of_another_role(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is another role's name"):
        a_recipe(tmp_path, scorers=[{"name": name, "rule": "numeric"}])


def test_a_running_job_takes_the_sizes_it_is_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        job = Job(tmp_path, a_recipe(tmp_path, learner=DEEPSPEED))
        async with job.running():
            ask(tmp_path, {"rollout": 3, "learner": 2})
            found = await job.told()
            assert found.pools["rollout"] == PoolSizes(wanted=3, ready=3, starting=0, leaving=0)
            assert found.pools["answer"].ready == 1
            assert found.pools["learner"].ready == 2
            assert found.refusal is None
            assert job.ranks.asked == [2]
            ask(tmp_path, {"rollout": 2})
            assert (await job.told()).pools["rollout"].ready == 2
            assert job.ranks.asked == [2]
        assert job.said == [
            "covey scale: rollout from 1 to 3, learner from 1 to 2",
            "covey scale: rollout from 3 to 2",
        ]

    asyncio.run(scenario())


def test_what_was_asked_for_is_what_a_resumed_job_begins_with(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)
    said: list[str] = []

    async def scenario() -> None:
        async with Job(tmp_path, recipe).running():
            ask(tmp_path, {"rollout": 3})
            ask(tmp_path, {"answer": 2})  # before anybody has heard of the first one
            await Job(tmp_path, recipe).told()

    assert at_asked_sizes(recipe, tmp_path, said.append) == recipe
    asyncio.run(scenario())
    resumed = at_asked_sizes(recipe, tmp_path, said.append)
    assert sizes_of(resumed) == {"rollout": 3, "answer": 2, "learner": 1}
    assert len(said) == 1
    assert said[0].startswith("sizes as last asked for with covey scale: rollout=3 answer=2 ")

    async def again() -> None:
        job = Job(tmp_path, resumed)
        async with job.running(3):
            assert (await job.told()).pools["rollout"].wanted == 3
        assert job.said == []  # what was heard before is not heard again

    asyncio.run(again())


def test_more_than_the_cluster_has_changes_nothing_and_says_what_there_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        recipe = a_recipe(tmp_path, rollout={"engine": "transformers", "gpus_per_worker": 1})
        room = Room(cpus=16, gpus=4, free_cpus=10, free_gpus=2)
        job = Job(tmp_path, recipe, room=room)
        async with job.running():
            ask(tmp_path, {"rollout": 4, "answer": 2})
            found = await job.told()
            assert found.refusal is not None
            assert found.refusal.startswith("rollout=4 answer=2 does not fit: ")
            assert "3 GPUs more are needed" in found.refusal
            assert "4 GPUs (2 in use)" in found.refusal
            assert (found.asked, found.pools["answer"].wanted) == ({}, 1)
            ask(tmp_path, {"rollout": 3})
            found = await job.told()
            assert (found.refusal, found.pools["rollout"].ready) == (None, 3)

    asyncio.run(scenario())


def test_what_shrinks_in_the_same_command_makes_room_for_what_grows(tmp_path: Path) -> None:
    scorer = {"name": "answer", "rule": "numeric", "gpus_per_actor": 1}
    rollout = {"engine": "transformers", "gpus_per_worker": 1, "workers": 3}
    recipe = a_recipe(tmp_path, rollout=rollout, scorers=[scorer])
    full = Room(cpus=8, gpus=4, free_cpus=8, free_gpus=0)
    assert lack_of_room(recipe, at_sizes(recipe, {"rollout": 1, "answer": 3}), full) is None
    assert lack_of_room(recipe, at_sizes(recipe, {"rollout": 2, "answer": 3}), full) is not None


def test_a_local_run_refuses_and_so_does_a_learner_that_cannot(tmp_path: Path) -> None:
    async def scenario() -> None:
        recipe = a_recipe(tmp_path, learner=DEEPSPEED)
        async with Job(tmp_path, recipe, room=None).running():
            ask(tmp_path, {"rollout": 2})
            found = await Job(tmp_path, recipe).told()
            assert (found.can_scale, found.pools["rollout"].wanted) == (False, 1)
            assert "--local" in (found.refusal or "")
        job = Job(tmp_path, recipe, ranks=Ranks(refuses="it does not start with 2 ranks"))
        async with job.running():
            ask(tmp_path, {"learner": 2})
            found = await job.told()
            assert found.refusal == "it does not start with 2 ranks"
            assert (found.asked, found.pools["learner"].wanted) == ({"learner": 1}, 1)

    asyncio.run(scenario())


def test_a_learner_that_is_being_restarted_is_not_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        job = Job(tmp_path, a_recipe(tmp_path, learner=DEEPSPEED))
        async with job.running():
            job.ranks.is_restarting = True
            while (found := read_pools(tmp_path)) is None or found.pools["learner"].ready:
                await asyncio.sleep(0)
            assert (found.pools["learner"].wanted, found.pools["learner"].starting) == (1, 1)

    asyncio.run(scenario())


def test_workers_that_cannot_start_are_told_and_not_asked_for_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        job = Job(tmp_path, a_recipe(tmp_path))
        async with job.running():
            job.spawner.failures.append(Fatal("no memory for the cache"))
            ask(tmp_path, {"rollout": 2})
            while not (found := await job.told()).refusal:
                await asyncio.sleep(0)
            assert "no memory for the cache" in (found.refusal or "")
            assert found.asked == {"rollout": 1}

    asyncio.run(scenario())


def test_a_request_that_names_a_role_of_another_recipe_ends_no_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        job = Job(tmp_path, a_recipe(tmp_path))
        async with job.running():
            ask(tmp_path, {"judge": 2})
            assert (await job.told()).refusal == "this run has no role 'judge'"

    asyncio.run(scenario())


def test_the_command_says_that_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = a_recipe(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert main(["scale", str(run), "rollout=2"]) == 2
    told = capsys.readouterr().err
    assert "is not running (crashed)" in told
    assert f"`covey train --resume {run}`" in told
    assert not (run / POOLS_FILE).exists()
