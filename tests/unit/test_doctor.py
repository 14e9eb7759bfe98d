"""covey doctor on folders of runs that go on, have ended, were killed, or hang."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.config import Recipe, load_recipe
from orchestration.doctor import Diagnosis, RunState, diagnosed
from orchestration.places import PoolSizes
from orchestration.run_directory import RunDirectory, RunStatus, RunSummary, write_json
from orchestration.scaling import POOLS_FILE, PoolsRecord
from orchestration.waiting import Whereabouts
from orchestration.waits import Waits
from orchestration.waits_file import MAX_WAITS, WAITS_FILE, WaitsRecord, waits_kept, waits_record
from tests.unit.small_project import written_project


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(written_project(tmp_path), [])


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunDirectory:
    """One step of two groups, still open."""
    run = RunDirectory.create(
        tmp_path / "runs",
        "small",
        now=datetime(2026, 3, 4),
        config=recipe.model_dump(mode="json"),
        versions={},
    )
    run.append_metrics(1, {"timing_s/step": 1.0, "reward": 0.5, "perf/throughput": 10.0})
    run.append_metrics(1, {"checkpoint/step": 1.0})
    for group in (0, 1):
        run.append_group(1, {"group": group, "prompt": {"id": f"train.jsonl:{group + 1}"}})
    return run


def ended(run: RunDirectory, status: RunStatus, cause: str | None = None) -> None:
    run.write_summary(
        RunSummary(name="small", status=status, cause=cause, seed=0, steps=1, planned_steps=2)
    )
    run.close()


def hanging() -> WaitsRecord:
    """What the process of a run writes that has just asked something of rollout worker 1."""

    async def scenario() -> WaitsRecord:
        waits = Waits()
        waits.whereabouts["rollout worker 1"] = Whereabouts(
            pid=77, node="10.0.0.7", logs=("l.err",)
        )

        async def look() -> WaitsRecord:
            return waits_record(waits, 1)

        async def sampled() -> WaitsRecord:
            what = "rollout worker 1: sampling 4 rollouts of group 3"
            return await waits.within(600.0, what, look())

        return await waits.within(1200.0, "group 3: all", sampled())

    return asyncio.run(scenario())


def written(run: RunDirectory, record: WaitsRecord) -> None:
    write_json(run.path / WAITS_FILE, asdict(record))


def test_a_run_that_goes_on_is_running_even_if_an_older_version_wrote_no_waits(
    run: RunDirectory, recipe: Recipe
) -> None:
    found = diagnosed(run.path, recipe)
    assert (found.state, found.step, found.planned_steps) == (RunState.RUNNING, 1, 2)
    assert found.is_healthy
    assert found.waits == ()
    assert found.ledger is None  # the files are being written
    run.close()


def test_a_killed_run_is_told_from_one_that_goes_on(run: RunDirectory, recipe: Recipe) -> None:
    written(run, hanging())
    run.close()
    found = diagnosed(run.path, recipe)
    assert found.state is RunState.CRASHED
    assert "the process of the run is gone" in found.problems[0]
    assert "no checkpoint" in found.problems[0]
    assert "rollout worker 1" in found.waits[0]  # what it waited for at last


def test_how_many_workers_there_are_and_how_many_a_resume_would_begin_with(
    run: RunDirectory, recipe: Recipe
) -> None:
    rollout = PoolSizes(wanted=4, ready=1, starting=3, leaving=0)
    learner = PoolSizes(wanted=1, ready=1, starting=0, leaving=1)
    record = PoolsRecord(
        can_scale=True, asked={"rollout": 4}, pools={"rollout": rollout, "learner": learner}
    )
    write_json(run.path / POOLS_FILE, asdict(record))
    found = diagnosed(run.path, recipe)
    assert found.pools == "rollout 1 of 4 ready, 3 starting; learner 1 of 1 ready, 1 leaving"
    assert found.remarks == ()
    run.close()
    found = diagnosed(run.path, recipe)
    assert found.pools is None
    assert "--resume begins with rollout=4, as covey scale asked" in found.remarks


def test_who_waits_for_whom_since_when_and_until_when(run: RunDirectory, recipe: Recipe) -> None:
    written(run, hanging())
    found = diagnosed(run.path, recipe, now=time.time() + 10)
    assert found.is_healthy
    (chain,) = found.waits
    assert chain.startswith("the run -> group 3 -> rollout worker 1 (sampling 4 rollouts of group")
    assert "since 10 s" in chain
    assert found.closest is not None
    assert "deadline of rollout worker 1 in 590 s" in found.closest
    run.close()


def test_a_wait_near_its_deadline_is_a_problem_that_names_process_and_log(
    run: RunDirectory, recipe: Recipe
) -> None:
    written(run, replace(hanging(), written=time.time() + 500))
    (problem,) = diagnosed(run.path, recipe, now=time.time() + 500).problems
    assert problem.startswith("rollout worker 1 (pid 77 on 10.0.0.7, log l.err) keeps the run")
    run.close()


def test_the_buffer_is_never_near_its_deadline_which_begins_anew_with_every_group(
    run: RunDirectory, recipe: Recipe
) -> None:
    async def scenario() -> WaitsRecord:
        waits = Waits()

        async def look() -> WaitsRecord:
            return waits_record(waits, 1)

        return await waits.within(600.0, "buffer: waiting for 3 finished groups", look())

    written(run, replace(asyncio.run(scenario()), written=time.time() + 599))
    assert diagnosed(run.path, recipe, now=time.time() + 599).is_healthy
    run.close()


def test_a_process_that_has_stopped_writing_is_a_problem(run: RunDirectory, recipe: Recipe) -> None:
    written(run, hanging())
    problems = diagnosed(run.path, recipe, now=time.time() + 100).problems
    assert "has not written its waits for 100 s" in problems[0]
    run.close()


def test_an_ended_run_is_healthy_if_it_finished_and_says_why_if_it_failed(
    run: RunDirectory, recipe: Recipe
) -> None:
    ended(run, RunStatus.FINISHED)
    assert diagnosed(run.path, recipe).is_healthy
    ended(RunDirectory.reopen(run.path, step=1), RunStatus.FAILED, "the engine melted")
    found = diagnosed(run.path, recipe)
    assert found.problems == ("the run failed: the engine melted",)


def test_the_ledger_of_an_ended_run_is_part_of_the_answer(
    run: RunDirectory, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run.append_group(2, {"group": 1, "prompt": {"id": "train.jsonl:2"}})
    ended(run, RunStatus.FINISHED)
    found: Diagnosis = diagnosed(run.path, recipe)
    assert "trained on twice, or dropped as well: 1" in found.problems
    assert main(["doctor", str(run.path)]) == 1
    assert "ledger: 3 groups trained on" in capsys.readouterr().out
    assert main(["doctor", str(run.path), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["state"] == "finished"
    assert record["ledger"]["num_trained"] == 3


def test_damaged_records_are_a_problem_and_never_no_ledger_in_silence(
    run: RunDirectory, recipe: Recipe
) -> None:
    run.append_metrics(3, {"timing_s/step": 1.0, "reward": 0.5, "perf/throughput": 10.0})
    ended(run, RunStatus.FINISHED)
    with (run.path / "groups.jsonl").open("ab") as file:
        file.write(b'{"step":2,"group":2,"prom\n')
    torn, missing = diagnosed(run.path, recipe).problems
    assert "line 3 of" in torn
    assert "no line of 1 steps, the first of them step 2" in missing


def test_a_damaged_summary_and_damaged_metrics_are_problems(
    run: RunDirectory, recipe: Recipe
) -> None:
    ended(run, RunStatus.FINISHED)
    (run.path / "summary.json").write_text('{"status": "finish')
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":2,"rew\xff\n')
    problems = "\n".join(diagnosed(run.path, recipe).problems)
    assert "the run failed: nobody knows how, as summary.json is damaged" in problems
    assert "metrics.jsonl: 1 damaged lines are left out" in problems


def test_a_folder_that_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path / "nothing")]) == 2


def test_the_file_is_there_while_the_run_goes_on_and_gone_afterwards(tmp_path: Path) -> None:
    async def scenario() -> None:
        waits = Waits()
        async with waits_kept(tmp_path, waits, step=lambda: 4):
            await asyncio.sleep(0)
            record = json.loads((tmp_path / WAITS_FILE).read_text())
            assert record["step"] == 4
        assert not (tmp_path / WAITS_FILE).exists()

    asyncio.run(scenario())


def test_of_thousands_of_waits_the_oldest_are_written_and_the_one_that_is_nearest_to_its_end() -> (
    None
):
    async def scenario() -> WaitsRecord:
        waits = Waits()
        with ExitStack() as groups:
            for group in range(3 * MAX_WAITS):
                groups.enter_context(waits.noted(f"group {group}"))

            async def look() -> WaitsRecord:
                return waits_record(waits, 1)

            async def sampled() -> WaitsRecord:
                return await waits.within(60.0, "rollout worker 1: sampling", look())

            return await waits.within(90.0, "rollout worker 0: sampling", sampled())

    record = asyncio.run(scenario())
    assert record.num_waits == 3 * MAX_WAITS + 2
    assert [wait.owner for wait in record.waits[MAX_WAITS - 1 :]] == [
        f"group {MAX_WAITS - 1}",
        "rollout worker 1",
    ]
