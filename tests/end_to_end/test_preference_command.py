"""`covey preference` and what `covey check` says of a preference model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from orchestration.check import checked
from orchestration.cli import main
from orchestration.config import load_recipe
from orchestration.starter.data import write_datasets
from tests.unit.preference_models import written_model
from tests.unit.small_project import settings

ANSWER = {"name": "answer", "rule": "numeric"}


def a_recipe(folder: Path, *, preference: bool = True) -> Path:
    data = write_datasets(folder / "data", num_train=30, num_heldout=5)
    model = {"folder": str(folder / "preference"), "num_questions": 30, "validation_share": 0.4}
    scorers = [ANSWER] + [{"name": "preference", "weight": 0, "preference": model}] * preference
    named = {"preference_scorer": "preference"} if preference else {}
    changed = {
        "data": {"train": str(data.train)},
        "sampling": {"max_prompt_length": 32, "max_completion_length": 48},
        "scorers": scorers,
        "algorithm": {"name": "ws_grpo", "num_generations": 4, **named},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(**changed), sort_keys=False))
    return path


def test_training_collects_what_is_missing_and_prints_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(a_recipe(tmp_path))
    assert main(["preference", "train", recipe, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_pairs"] > 0 and "240 answers to 30 prompts" in said.err
    assert main(["preference", "train", recipe, "--scorers.1.preference.epochs", "1"]) == 0
    said = capsys.readouterr()
    assert "answers to 30 prompts," not in said.err, "answers that are there are not asked for anew"
    assert "pair accuracy" in said.out


def test_what_is_missing_is_said_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preference", "collect", str(a_recipe(tmp_path, preference=False))]) == 2
    assert "has 0 preference models and 1 other" in capsys.readouterr().err
    assert main(["preference", "eval", str(a_recipe(tmp_path))]) == 2
    assert "has no data.evaluation" in capsys.readouterr().err


def test_the_check_names_a_preference_model_that_is_not_trained_yet(tmp_path: Path) -> None:
    recipe = load_recipe(a_recipe(tmp_path))
    found = {finding.name: finding for finding in checked(recipe, local=True)}
    assert not found["scorer preference"].ok
    assert "covey preference train" in found["scorer preference"].detail
    written_model(tmp_path / "preference")
    found = {finding.name: finding for finding in checked(recipe, local=True)}
    assert [finding.line() for finding in found.values() if not finding.ok] == []
