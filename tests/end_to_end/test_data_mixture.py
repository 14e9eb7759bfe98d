"""A run over two weighted data sets: its groups, its metrics, its ledger, its resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.config import load_recipe
from orchestration.doctor import diagnosed
from orchestration.run_inputs import read_inputs
from orchestration.starter.data import write_datasets
from tests.end_to_end.runs import covey, finished, only_run

pytestmark = pytest.mark.slow
STEPS, PROMPTS = 4, 8


def _two_sets(folder: Path) -> dict[str, Path]:
    """The starter's problems in a file for each domain; the products are gone through twice."""
    data = write_datasets(folder / "data", num_train=400, num_heldout=20)
    problems = [json.loads(line) for line in data.train.read_text().splitlines()]
    files = {}
    for domain, count in (("sums", 40), ("products", 5)):
        found = [json.dumps(p) for p in problems if p["domain"] == domain][:count]
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("\n".join(found) + "\n")
    return files


def test_two_sets_of_weights_3_and_1(tmp_path: Path) -> None:
    files = _two_sets(tmp_path)
    sets = f"[{{source: {files['sums']}, weight: 3}}, {{source: {files['products']}}}]"
    settings = {
        "data.train": sets,
        "data.evaluation": f"[{files['sums']}, {files['products']}]",
        "data.domain_column": "null",  # a set's name is the domain of its prompts
        "evaluation.prompts": 4,
        "evaluation.samples": 1,
        "output": tmp_path / "runs",
        "steps": STEPS,
        "checkpoint.every": 2,
        "rollout.engine": "transformers",
        "learner.backend": "torch",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run = covey("train", "quickstart", "--local", *words)
    output = finished(run)
    assert run.returncode == 0, output
    left = only_run(tmp_path / "runs")

    groups = sorted(left.groups, key=lambda record: record["group"])
    names = [record["prompt"]["domain"] for record in groups]
    assert names == STEPS * PROMPTS // 4 * ["sums", "sums", "products", "sums"]
    ids = [record["prompt"]["id"] for record in groups]
    products = [i for i in ids if i.startswith("products")]
    assert len(products) == 8
    assert len(set(products[:5])) == 5  # its first epoch
    assert max(Counter(i for i in ids if i.startswith("sums")).values()) == 1

    for step in left.steps:
        assert (step["domain/sums/groups"], step["domain/products/groups"]) == (6.0, 2.0)
        both = 6 * step["domain/sums/reward"] + 2 * step["domain/products/reward"]
        assert both / 8 == pytest.approx(step["reward"])
    assert left.steps[-1]["data/sums/epoch"] == 24 / 40
    assert left.steps[-1]["data/products/epoch"] == 8 / 5
    lines = [json.loads(line) for line in (left.path / "metrics.jsonl").open()]
    assert {"eval/sums/pass@1", "eval/products/pass@1"} <= lines[0].keys()

    middle = str(left.path / "checkpoints" / "step_2")
    again = covey("train", "--resume", middle, "--local")
    output = finished(again)
    assert again.returncode == 0, output
    resumed = sorted(left.groups, key=lambda record: record["group"])
    assert [record["prompt"]["id"] for record in resumed] == ids

    recipe = load_recipe(left.path / "config.yaml")
    ledger = diagnosed(left.path, recipe).ledger
    assert ledger is not None
    assert ledger.line().endswith("none lost, none twice, in the planned order")

    files["products"].write_text(files["sums"].read_text())
    with pytest.raises(UserError, match=r"products: 5 prompts \(fingerprint .* now") as refused:
        read_inputs(recipe, middle)
    assert "Put the data back to continue it" in str(refused.value)
