"""A Ray of our own that is late is started once more, and then given up."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from grpo.errors import Fatal
from orchestration import cluster
from orchestration.config import load_recipe
from tests.unit.small_project import written_project


@pytest.mark.parametrize("num_late", [0, 1, 2])
def test_ray_gets_a_second_half_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_late: int
) -> None:
    tries: list[object] = []

    def start(**where: object) -> None:
        tries.append(where["address"])
        if len(tries) <= num_late:
            raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 100.0})
    recipe = load_recipe(written_project(tmp_path), [])
    if num_late < 2:
        assert cluster.connect(recipe)
    else:
        with pytest.raises(Fatal, match="timed out during startup"):
            cluster.connect(recipe)
    assert tries == ["local"] * min(num_late + 1, 2)
