"""`covey eval` on the starter model with the small engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.cli import main
from orchestration.model_evaluation import model_folder
from tests.unit.small_project import MODEL, written_project


def _options(folder: Path) -> list[str]:
    written_project(folder)
    data = ["--data", str(folder / "train.jsonl"), "--engine", "transformers"]
    return [*data, "--max-completion-length", "48"]


def test_a_model_is_measured_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(MODEL), *_options(tmp_path), "--samples", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 3
    assert report["overall"]["num_prompts"] == 2
    assert set(report["overall"]["pass_at"]) >= {"1"}
    assert report["failures"] == {}


def test_a_reward_function_can_judge_instead_of_a_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.py").write_text("def f(completions, **kw): return [1.0] * len(completions)")
    judge = ["--function", f"{tmp_path}/r.py:f", "--json"]
    assert main(["eval", str(MODEL), *_options(tmp_path), *judge]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["pass_at"]["1"] == 1.0


def test_a_checkpoint_counts_as_its_export(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_2"
    shutil.copytree(MODEL, checkpoint / "huggingface")
    assert model_folder(checkpoint, print) == str(checkpoint / "huggingface")
    with pytest.raises(UserError, match=r"holds neither config\.json nor a checkpoint"):
        model_folder(tmp_path, print)


def test_missing_things_are_the_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), *_options(tmp_path)]) == 2
    assert "is no model" in capsys.readouterr().err
    assert main(["eval", str(MODEL), "--data", "absent.jsonl"]) == 2
    assert "absent.jsonl: No such file" in capsys.readouterr().err
