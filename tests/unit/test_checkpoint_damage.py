"""Damaged and misplaced checkpoints: one bit anywhere is noticed, said, and never a traceback."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.checkpoint import (
    checkpoint_folder,
    decoded_state,
    latest_checkpoint,
    mark,
    marked_step,
    read_driver_state,
    saved_steps,
)
from orchestration.config import load_recipe
from orchestration.manifest import MANIFEST_FILE, STATE_FILE, find_damage
from orchestration.resume import resolve_resume, whole_checkpoints
from orchestration.run_directory import CONFIG_FILE, ID_FILE, RunDirectory
from orchestration.run_inputs import RunInputs, read_inputs
from tests.unit.checkpoint_cases import OWN_FILE, FileLearner, a_state, save, saved
from tests.unit.small_project import written_project
from tests.unit.test_checkpoint_files import History


def chosen(run: Path) -> tuple[str | None, list[str]]:
    """Name of the checkpoint to continue from, and what is said of it."""
    remarks: list[str] = []
    folder = latest_checkpoint(run, remarks.append)
    return None if folder is None else folder.name, remarks


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_one_bit_of_the_manifest_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, bit: int
) -> None:
    folder = saved(tmp_path, 1)
    path = folder / MANIFEST_FILE
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place, bit))
        if find_damage(folder, checksums=True) is None:
            unnoticed.append(whole[place : place + 1])
    # A blank between two words that became another character that JSON skips.
    assert set(unnoticed) <= {b" ", b"\n"}


@pytest.mark.parametrize(
    "manifest",
    ['{"step": 2, "files": []}', '{"step": 2, "files": {}}', '{"files": {}}', "[]", "null", ""],
)
def test_a_manifest_of_nothing_vouches_for_nothing(tmp_path: Path, manifest: str) -> None:
    _, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    (newer / MANIFEST_FILE).write_text(manifest)
    name, remarks = chosen(tmp_path)
    assert name == "step_1"
    assert len(remarks) == 1
    assert "step_2 cannot be used: manifest.json" in remarks[0]


@pytest.mark.parametrize("dropped", [STATE_FILE, OWN_FILE])
def test_a_manifest_names_the_drivers_and_the_learners_files(tmp_path: Path, dropped: str) -> None:
    path = saved(tmp_path, 1) / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["files"][dropped]
    path.write_text(json.dumps(content))
    assert "manifest.json" in str(find_damage(path.parent, checksums=True))


@pytest.mark.parametrize("marker", [b"\xf3tep_2\n", b"", b"step_\xc2\xb2\n", b"step_02\n"])
def test_a_damaged_marker_is_none_and_is_said(tmp_path: Path, marker: bytes) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "latest").write_bytes(marker)
    assert marked_step(tmp_path, "latest") is None
    name, remarks = chosen(tmp_path)
    assert name == "step_2"
    assert "latest is damaged: it names no checkpoint; step_2 is used instead" in remarks[0]


def test_only_folders_that_a_step_has_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step_\u00b2", "step_04", "step_", "step_1.old", "step_\u0663"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert saved_steps(tmp_path) == {1}
    assert list(whole_checkpoints(tmp_path)) == [1]


def test_an_older_checkpoint_is_not_used_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (checkpoint_folder(tmp_path, 2) / OWN_FILE).write_bytes(b"w" * 100)
    (tmp_path / CONFIG_FILE).touch()
    point = resolve_resume(str(tmp_path), tmp_path)
    assert point.checkpoint == checkpoint_folder(tmp_path, 1)
    (remark,) = point.remarks
    assert "step_2 cannot be used: learner/rank_0.safetensors has 100 bytes instead of" in remark
    assert "step_1 is used instead" in remark
    shutil.rmtree(checkpoint_folder(tmp_path, 2))
    (remark,) = resolve_resume(str(tmp_path), tmp_path).remarks
    assert "step_2 cannot be used: its folder is gone" in remark


def test_what_is_expected_needs_no_words(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert chosen(tmp_path) == ("step_2", [])
    mark(tmp_path, "latest", 1)
    assert chosen(tmp_path) == ("step_1", [])
    mark(tmp_path, "latest", None)  # a crash between renaming and marking
    assert chosen(tmp_path) == ("step_2", [])


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    shutil.rmtree(checkpoint_folder(tmp_path, 2))
    shutil.copytree(checkpoint_folder(tmp_path, 1), checkpoint_folder(tmp_path, 2))
    name, remarks = chosen(tmp_path)
    assert name == "step_1"
    assert "step_2 cannot be used: manifest.json says that it is step_1" in remarks[0]


def a_run(folder: Path, identity: str, *steps: int) -> Path:
    folder.mkdir()
    (folder / ID_FILE).write_text(f"{identity}\n")
    save(folder, *steps, learner=FileLearner(identity.encode()))
    return folder


def test_a_checkpoint_of_another_run_is_none(tmp_path: Path) -> None:
    ours, other = a_run(tmp_path / "ours", "aa", 3, 4), a_run(tmp_path / "other", "bb", 4)
    shutil.rmtree(checkpoint_folder(ours, 4))
    shutil.copytree(checkpoint_folder(other, 4), checkpoint_folder(ours, 4))
    name, remarks = chosen(ours)
    assert name == "step_3"
    assert "it was written by another run (id bb; this one has aa)" in remarks[0]


def test_a_run_is_the_same_wherever_its_folder_is_and_without_its_id(tmp_path: Path) -> None:
    run = a_run(tmp_path / "before", "aa", 3, 4).rename(tmp_path / "after")
    assert chosen(run) == ("step_4", [])
    (run / ID_FILE).unlink()
    assert chosen(run) == ("step_4", [])


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"format": 1}'])
def test_a_damaged_state_of_the_driver_is_one_clear_error(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path, 1)
    (folder / STATE_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=STATE_FILE):
        read_driver_state(folder)


def test_the_state_of_another_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps no state"):
        decoded_state(None, {"length": 3})
    with pytest.raises(ValueError, match="lengths"):
        decoded_state(History(lengths=(), solved={}), {"length": 3})


def inputs_of(folder: Path, **changed: object) -> RunInputs:
    """Of a run that is resumed from a checkpoint whose driver's state was changed so."""
    recipe = load_recipe(str(written_project(folder)))
    run = RunDirectory.create(
        folder, "r", now=datetime(2026, 3, 4), config=recipe.model_dump(mode="json"), versions={}
    )
    run.close()
    state = replace(a_state(1), prompts=read_inputs(recipe, None).prompts.record)
    save(run.path, 1, state=replace(state, tokens={"generated": 5}, **changed))  # type: ignore[arg-type]  # the test's own keys
    return read_inputs(recipe, str(run.path))


def test_a_checkpoint_of_another_seed_or_algorithm_is_one_clear_error(tmp_path: Path) -> None:
    for name in ("same", "seed", "state"):
        (tmp_path / name).mkdir()
    found = inputs_of(tmp_path / "same")
    assert found.progress_at(found.state).step == 1
    with pytest.raises(UserError, match="was written under seed 7, the run has seed 0"):
        inputs_of(tmp_path / "seed", seed=7)
    found = inputs_of(tmp_path / "state", algorithm={"length": 12})
    with pytest.raises(UserError, match=r"step 1 does not fit the algorithm grpo: .*no state"):
        found.progress_at(found.state)
