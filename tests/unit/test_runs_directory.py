"""The folder of a run: created whole, never shared, cut back on resume."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from grpo.errors import UserError
from orchestration.run_directory import RunDirectory, RunStatus, RunSummary, version_changes

NOW = datetime(2026, 3, 4, 5, 6, 7)
CONFIG = {"name": "demo", "steps": 3, "sampling": {"temperature": 1.0}, "scorers": [{"weight": 2}]}


def make(output: Path) -> RunDirectory:
    return RunDirectory.create(
        output, "demo", now=NOW, config=CONFIG, versions={"python": "3.11.9", "torch": "2.13.0"}
    )


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_run_holds_its_recipe_as_a_recipe_and_its_versions(tmp_path: Path) -> None:
    run = make(tmp_path / "runs")
    assert run.path == tmp_path / "runs" / "demo-20260304-050607"
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert json.loads((run.path / "versions.json").read_text())["torch"] == "2.13.0"


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    paths = [make(tmp_path).path for _ in range(3)]
    names = [path.name for path in paths]
    assert names == ["demo-20260304-050607", "demo-20260304-050607-2", "demo-20260304-050607-3"]


def test_a_run_that_could_not_be_described_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError):
        RunDirectory.create(tmp_path, "demo", now=NOW, config={"bad": object()}, versions={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b", "-rf"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        RunDirectory.create(tmp_path, name, now=NOW, config={}, versions={})


def test_an_output_that_is_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="output"):
        make(tmp_path / "runs")


def test_a_record_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(1, {"reward": 0.5})
    assert lines(run.path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]


def test_a_number_that_is_not_finite_is_null_and_not_broken_json(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(1, {"kl": math.nan, "ratio": math.inf, "reward": 1.0})
    text = (run.path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "kl": None, "ratio": None, "reward": 1.0}


def test_resuming_after_step_2_forgets_the_records_of_later_steps(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3, 12):
        run.append_metrics(step, {"reward": float(step)})
    # Groups are recorded when they end: the order of steps is not the order of lines.
    for step in (1, 3, 2, 20):
        run.append_group(step, {"group": step, "prompt": {"step": 1}})
    run.close()
    again = RunDirectory.reopen(run.path, step=2)
    again.append_metrics(3, {"reward": -3.0})
    again.append_group(3, {"group": 3})
    assert [line["step"] for line in lines(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert lines(run.path / "metrics.jsonl")[-1]["reward"] == -3.0
    assert [line["group"] for line in lines(run.path / "groups.jsonl")] == [1, 2, 3]


def test_an_open_run_is_turned_back_and_stays_locked(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics(step, {"reward": float(step)})
        run.append_group(step, {"group": step})
    run.turn_back(1)
    with pytest.raises(UserError, match="another process is writing"):
        RunDirectory.reopen(run.path, step=1)
    run.append_metrics(2, {"reward": -2.0})
    run.append_group(2, {"group": 7})
    assert [line["reward"] for line in lines(run.path / "metrics.jsonl")] == [1.0, -2.0]
    assert [line["group"] for line in lines(run.path / "groups.jsonl")] == [1, 7]


def test_a_line_that_was_being_written_when_the_process_died_is_dropped(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(1, {"reward": 1.0})
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step":2,"rew')
    RunDirectory.reopen(run.path, step=2).append_metrics(2, {"reward": 2.0})
    assert [line["reward"] for line in lines(run.path / "metrics.jsonl")] == [1.0, 2.0]


def test_resuming_says_what_is_wrong_with_the_records_that_stay(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(1, {"reward": 0.5})
    run.close()
    (run.path / "groups.jsonl").unlink()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b"rubbish\n")
        file.write(b"torn when the process died")
    reopened = RunDirectory.reopen(run.path, step=1)
    strange, gone = reopened.remarks
    assert "left out 1 lines" in strange
    assert "groups.jsonl is gone" in gone
    reopened.close()


def test_resuming_takes_back_that_the_run_is_over(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_summary(
        RunSummary(
            name="demo", status=RunStatus.FAILED, cause="lost", seed=0, steps=1, planned_steps=3
        )
    )
    run.close()
    assert json.loads((run.path / "summary.json").read_text())["status"] == "failed"
    RunDirectory.reopen(run.path, step=1)
    assert not (run.path / "summary.json").exists()


def test_software_that_changed_since_the_run_began_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    now = {"python": "3.11.9", "torch": "2.14.0", "ray": "2.60.0"}
    assert version_changes(run.path, now) == ["ray none -> 2.60.0", "torch 2.13.0 -> 2.14.0"]


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b"\xff\xfe{", b'{"torch": 2}'])
def test_software_that_is_not_known_any_more_is_said(tmp_path: Path, damage: bytes | None) -> None:
    run = make(tmp_path)
    if damage is None:
        (run.path / "versions.json").unlink()
    else:
        (run.path / "versions.json").write_bytes(damage)
    what = "gone" if damage is None else "damaged"
    assert version_changes(run.path, {}) == [f"not known, as versions.json is {what}"]


def test_a_run_that_is_being_written_cannot_be_continued_by_another(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_metrics(9, {"reward": 1.0})
    with pytest.raises(UserError, match="another process"):
        RunDirectory.reopen(run.path, step=0)
    assert len(lines(run.path / "metrics.jsonl")) == 1  # not cut back either
    run.close()
    RunDirectory.reopen(run.path, step=0).close()
    assert lines(run.path / "metrics.jsonl") == []
