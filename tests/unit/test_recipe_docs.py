"""docs/your-own-run.md: its blocks are a project that passes the check."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from orchestration.check import checked
from orchestration.config import load_recipe
from tests.unit.small_project import MODEL, REPOSITORY, written_project


def _blocks(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "your-own-run.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_page_describes_a_run_that_passes_the_check(tmp_path: Path) -> None:
    (data,), (function,), (_, recipe) = _blocks("json"), _blocks("python"), _blocks("yaml")
    (tmp_path / "train.jsonl").write_text(data)
    (tmp_path / "rewards.py").write_text(function)
    (tmp_path / "my-run.yaml").write_text(recipe)
    shutil.copytree(MODEL, tmp_path / "path" / "to" / "model")
    loaded = load_recipe(tmp_path / "my-run.yaml", ["rollout.engine=transformers"])
    findings = {finding.name: finding for finding in checked(loaded)}
    assert [f.line() for f in findings.values() if not f.ok] == []
    assert findings["scorer right"].detail.startswith("1 for 'answer: red'")
    assert findings["data.train"].detail.startswith("2 prompts")


def test_its_mixture_of_two_sets_passes_the_check(tmp_path: Path) -> None:
    mixture, _ = _blocks("yaml")
    for name in ("maths", "maths_test"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "7 +1", "answer": 8}\n')
    for name in ("words", "words_test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "2 +1", "final": 3}\n')
    path = written_project(tmp_path, **yaml.safe_load(mixture))
    found = {f.name: f for f in checked(load_recipe(path), local=True)}
    assert [f.line() for f in found.values() if not f.ok] == []
    assert "25 % of the groups" in found["data.train"].detail
