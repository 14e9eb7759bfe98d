"""Checkpoints: whole or not there, the newest kept, a damaged one never chosen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from grpo.errors import Fatal, UserError
from orchestration.checkpoint import (
    DriverState,
    abandon_later,
    decoded_state,
    encoded_state,
    latest_checkpoint,
    load_checkpoint,
    read_driver_state,
)
from orchestration.manifest import find_damage
from tests.unit.checkpoint_cases import FileLearner, names, save, saved

STATE = DriverState(
    step=5,
    version=5,
    seed=3,
    next_group=41,
    pending=(38, 40),
    algorithm={"length": 12},
    counters={"dropped/constant_outcome": 2},
    wall_s={"train": 1.5},
    tokens={"generated": 1000},
)


class DistantLearner(FileLearner):
    """Writes to the disk of another machine."""

    async def write(self, folder: Path) -> Sequence[str]:
        return ["learner/rank_0.safetensors"]


class DyingLearner(FileLearner):
    """Is lost after half of its files."""

    async def write(self, folder: Path) -> Sequence[str]:
        await super().write(folder)
        raise ConnectionError("the learner is gone")


def test_a_checkpoint_brings_back_learner_and_driver(tmp_path: Path) -> None:
    save(tmp_path, 5, learner=FileLearner(b"abc"), state=STATE)
    path = tmp_path / "checkpoints" / "step_5"
    other = FileLearner(b"")
    assert asyncio.run(load_checkpoint(path, other, {})) == STATE
    assert other.weights == b"abc"
    assert latest_checkpoint(tmp_path) == path
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_5\n"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10, 11, keep=2)
    assert names(tmp_path) == ["latest", "step_10", "step_11"]


def test_a_save_that_fails_leaves_the_checkpoint_before_it_in_force(tmp_path: Path) -> None:
    before = saved(tmp_path, 1, keep=1)
    with pytest.raises(ExceptionGroup) as caught:
        saved(tmp_path, 2, keep=1, learner=DyingLearner())
    assert caught.group_contains(ConnectionError, match="the learner is gone")
    assert latest_checkpoint(tmp_path) == before
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["latest", "step_2"]  # the half-written draft is gone


def test_a_learner_whose_files_do_not_arrive_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        saved(tmp_path, 1, learner=DistantLearner())
    assert caught.group_contains(Fatal, match="that all nodes share")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("torn", ["manifest.json", "driver_state.json"])
def test_a_torn_checkpoint_is_passed_over_for_an_older_whole_one(tmp_path: Path, torn: str) -> None:
    older, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    (newer / torn).unlink()
    assert latest_checkpoint(tmp_path) == older


def test_a_file_that_was_cut_short_is_noticed_by_its_size(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    (path / "huggingface" / "model.safetensors").write_bytes(b"w" * 999)
    assert "999 bytes instead of 1000" in str(find_damage(path, checksums=False))
    assert latest_checkpoint(tmp_path) is None


def test_changed_contents_of_the_same_size_are_noticed_before_the_learner_loads(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, 1)
    (path / "huggingface" / "model.safetensors").write_bytes(b"v" + b"w" * 999)
    assert find_damage(path, checksums=False) is None
    learner = FileLearner(b"untouched")
    with pytest.raises(UserError, match=r"contents of huggingface/model.safetensors"):
        asyncio.run(load_checkpoint(path, learner, {}))
    assert learner.weights == b"untouched"


def test_a_crash_between_rename_and_marker_still_finds_the_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert latest_checkpoint(tmp_path) == path


def test_the_marker_decides_between_whole_checkpoints(tmp_path: Path) -> None:
    older, _ = saved(tmp_path, 1), saved(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step_1\n")
    assert latest_checkpoint(tmp_path) == older


def test_going_on_from_an_older_checkpoint_abandons_the_later_ones(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    path = saved(tmp_path, 2, keep=3, learner=FileLearner(b"second life"))
    assert names(tmp_path) == ["latest", "step_1", "step_2"]
    assert (path / "huggingface" / "model.safetensors").read_bytes() == b"second life"
    assert latest_checkpoint(tmp_path) == path


def test_abandoned_checkpoints_are_never_chosen_again_and_go_with_the_next_save(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    abandon_later(tmp_path, 2)
    assert names(tmp_path) == [".step_3.abandoned", "latest", "step_1", "step_2"]
    found = latest_checkpoint(tmp_path, print)
    assert found is not None and found.name == "step_2"
    save(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["latest", "step_1", "step_2", "step_3"]


def test_the_marker_goes_back_before_anything_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", None)
        with pytest.raises(TypeError):
            abandon_later(tmp_path, 1)
    found = latest_checkpoint(tmp_path, print)
    assert found is not None and found.name == "step_1"


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def test_a_state_of_another_format_is_refused_and_not_guessed_at(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    data = json.loads((path / "driver_state.json").read_text())
    (path / "driver_state.json").write_text(json.dumps(data | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_driver_state(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The kind of state that an algorithm keeps."""

    lengths: tuple[int, ...]
    solved: dict[str, float]
    inner: tuple[tuple[str, int], ...] = ()


def test_an_algorithms_state_survives_the_file() -> None:
    state = History(lengths=(3, 1), solved={"row-1": 0.1}, inner=(("a", 2),))
    value = json.loads(json.dumps(encoded_state(state)))
    assert decoded_state(History(lengths=(), solved={}), value) == state
    assert decoded_state(None, encoded_state(None)) is None
