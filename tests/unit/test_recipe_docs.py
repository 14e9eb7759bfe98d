"""docs/your-own-run.md: its blocks are a project that passes the check."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from orchestration.check import checked
from orchestration.config import load_recipe
from tests.unit.small_project import MODEL, REPOSITORY


def _blocks(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "your-own-run.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_page_describes_a_run_that_passes_the_check(tmp_path: Path) -> None:
    (data,), (function,), (recipe,) = _blocks("json"), _blocks("python"), _blocks("yaml")
    (tmp_path / "train.jsonl").write_text(data)
    (tmp_path / "rewards.py").write_text(function)
    (tmp_path / "my-run.yaml").write_text(recipe)
    shutil.copytree(MODEL, tmp_path / "path" / "to" / "model")
    loaded = load_recipe(tmp_path / "my-run.yaml", ["rollout.engine=transformers"])
    findings = {finding.name: finding for finding in checked(loaded)}
    assert [f.line() for f in findings.values() if not f.ok] == []
    assert findings["scorer right"].detail.startswith("1 for 'answer: red'")
    assert findings["data.train"].detail.startswith("2 prompts")
