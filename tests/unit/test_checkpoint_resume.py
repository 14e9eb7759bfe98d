"""What `--resume` accepts, and what it answers to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.resume import ResumePoint, require_same_recipe, resolve_resume
from orchestration.run_directory import CONFIG_FILE
from tests.unit.checkpoint_cases import FILE, save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo-20260304-050607"
    save(run, 1, 2)
    (run / CONFIG_FILE).touch()
    return run


def test_a_run_is_found_by_folder_and_by_name(run: Path) -> None:
    expected = ResumePoint(run=run, checkpoint=run / "checkpoints" / "step_2")
    assert resolve_resume(str(run), run.parent) == expected
    assert resolve_resume(run.name, run.parent) == expected


def test_one_checkpoint_of_a_run_can_be_named(run: Path) -> None:
    older = run / "checkpoints" / "step_1"
    assert resolve_resume(str(older), run.parent) == ResumePoint(run=run, checkpoint=older)


def test_an_unknown_run_is_answered_with_the_runs_there_are(run: Path) -> None:
    with pytest.raises(UserError, match=r"no such run.*demo-20260304-050607"):
        resolve_resume("demo-2025", run.parent)


def test_a_run_that_died_before_its_first_checkpoint_begins_again(run: Path) -> None:
    young = run.parent / "young-run"
    (young / "checkpoints" / ".step_2.draft").mkdir(parents=True)
    (young / CONFIG_FILE).touch()
    assert resolve_resume("young-run", run.parent) == ResumePoint(run=young, checkpoint=None)


def test_a_folder_that_is_no_run_is_not_continued(run: Path) -> None:
    (run.parent / "other").mkdir()
    with pytest.raises(UserError, match="no run folder"):
        resolve_resume("other", run.parent)


def test_a_run_whose_checkpoints_are_all_damaged_says_what_to_do(run: Path) -> None:
    for step in (1, 2):
        (run / "checkpoints" / f"step_{step}" / FILE).unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint.*step_2.*without --resume"):
        resolve_resume(str(run), run.parent)


def test_a_damaged_checkpoint_that_was_named_is_not_replaced_by_another(run: Path) -> None:
    named = run / "checkpoints" / "step_1"
    (named / FILE).write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes instead of 1000"):
        resolve_resume(str(named), run.parent)


def test_a_changed_recipe_is_refused_with_every_change() -> None:
    saved = {"seed": 0, "steps": 60, "algorithm": {"name": "grpo", "beta": 0.0}}
    given = {"seed": 1, "steps": 80, "algorithm": {"name": "grpo", "beta": 0.1}}
    with pytest.raises(UserError) as caught:
        require_same_recipe(saved, given, may_change=frozenset({"steps"}))
    message = str(caught.value)
    assert "seed: was 0, is 1" in message
    assert "algorithm.beta: was 0.0, is 0.1" in message
    assert "60" not in message


def test_sections_that_do_not_touch_learning_may_change() -> None:
    saved = {"checkpoint": {"every": 0, "keep": 2}, "seed": 0}
    given = {"checkpoint": {"every": 10, "keep": 2}, "seed": 0}
    require_same_recipe(saved, given, may_change=frozenset({"checkpoint"}))
