"""What the best checkpoint is known by is lost: found again in metrics.jsonl, or not gone on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.best import Evaluations, mend_evaluations
from orchestration.checkpoint import checkpoint_folder, marked_step
from orchestration.run_directory import METRICS_FILE, RunDirectory
from tests.unit.checkpoint_cases import a_report, save

FOUND = {1: 0.5, 2: 0.25, 3: 0.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of step 1, the best, and of step 3, the newest; step 2 was evaluated, too."""
    directory = RunDirectory.create(tmp_path, "r", now=datetime(2026, 3, 4), config={}, versions={})
    for step, passed in ({0: 0.9} | FOUND).items():
        directory.append_metrics(step, {"reward": 0.1, "timing_s/step": 1.0})
        directory.append_metrics(step, a_report(passed, score=0.1).metrics())
    directory.close()
    reports = {step: a_report(passed, score=0.1) for step, passed in FOUND.items()}
    save(directory.path, 1, 2, 3, keep=1, keep_best=1, evaluations=reports)
    return directory.path


def file_of(run: Path) -> Path:
    return run / "checkpoints" / "evaluations.json"


def mended(run: Path, step: int = 3) -> list[str]:
    remarks: list[str] = []
    mend_evaluations(run, step, remarks.append)
    return remarks


def go_on(run: Path, evaluations: Mapping[int, float]) -> None:
    """Evaluate and save steps after 3."""
    reports = {step: a_report(passed) for step, passed in evaluations.items()}
    save(run, *reports, keep=1, keep_best=1, begin=3, evaluations=reports)


@pytest.mark.parametrize(
    "damage", [b"", b"\xfb{", b'{"steps": {}}', b"[]", b'{"metrics": 1}', None]
)
def test_lost_evaluations_are_found_in_the_metrics_and_the_best_stays(
    run: Path, damage: bytes | None
) -> None:
    before = file_of(run).read_text()
    if damage is None:
        file_of(run).unlink()
    else:
        file_of(run).write_bytes(damage)
        with pytest.raises(UserError, match=r"evaluations\.json is damaged"):
            Evaluations(run, step=3)
    (remark,) = mended(run)
    assert "evaluations.json is" in remark
    assert "written again from metrics.jsonl (evaluations found: 3)" in remark
    assert json.loads(file_of(run).read_text()) == json.loads(before)
    go_on(run, {4: 0.1, 5: 0.2})
    assert marked_step(run, "best") == 1
    assert checkpoint_folder(run, 1).is_dir()


def test_one_bit_of_the_evaluations_is_no_traceback(run: Path) -> None:
    whole = file_of(run).read_bytes()
    num_noticed = 0
    for place in range(len(whole)):
        for mask in (1, 0x20, 0x80):
            file_of(run).write_bytes(
                whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
            )
            try:
                Evaluations(run, step=3)
            except UserError:
                num_noticed += 1
    assert num_noticed > 2 * len(whole)


def test_whole_evaluations_are_left_alone(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    assert mended(run) == []


def test_the_best_checkpoint_is_not_forgotten_in_silence(run: Path) -> None:
    file_of(run).write_bytes(b"")
    (run / METRICS_FILE).unlink()
    with pytest.raises(UserError, match=r"what step_1, the best checkpoint, has scored.*export"):
        mended(run)
    assert file_of(run).read_bytes() == b""
    # What the message says to do.
    (run / "checkpoints" / "best").unlink()
    file_of(run).unlink()
    assert mended(run) == []


def test_a_best_checkpoint_that_is_abandoned_needs_no_evaluation(run: Path) -> None:
    file_of(run).write_bytes(b"")
    (run / METRICS_FILE).unlink()
    remarks = mended(run, step=0)
    assert "metrics are left out" in remarks[0]
    assert "(evaluations found: 0)" in remarks[1]


def test_a_run_that_never_evaluated_has_nothing_to_mend(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert mended(tmp_path) == []
    assert not file_of(tmp_path).exists()
