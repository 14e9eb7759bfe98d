"""Resume equals uninterrupted: a run killed at three points has the same metrics and weights.

Staleness 0 in one process. Every figure of what was learnt must be equal bit for bit, not close.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.chaos.attacked import SMALL, Attack, whole_ledger
from tests.chaos.plan import Kill, Phase, Role

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SEED = 8, 11
# Of the process and its clock, not of the policy.
OTHERS = ("timing_s/", "perf/", "idle/", "checkpoint/", "scorers/")


def ended(folder: Path, kills: list[Kill]) -> Path:
    folder.mkdir()
    changes = {**SMALL, "steps": STEPS, "checkpoint.every": 1, "learner.learning_rate": 1e-3}
    attack = Attack(folder=folder, kills=kills, changes=changes, is_local=True)
    assert attack.carry_on() == 0, attack.told()
    assert len(attack.killed) == len(kills), attack.told()
    assert attack.run is not None
    whole_ledger(attack.run)
    return attack.run


def learnt(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of the steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {name: value for name, value in line.items() if not name.startswith(OTHERS)}
        for line in lines
        if "reward" in line
    ]


def sampled(run: Path) -> list[object]:
    """Tokens and log-probabilities of every group, in the order of training."""
    lines = map(json.loads, (run / "groups.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["group"], line["rollouts"]) for line in lines]


def test_a_run_killed_at_three_random_points_ends_with_the_same_metrics_and_weights(
    tmp_path: Path,
) -> None:
    rng = random.Random(SEED)
    kills = [
        Kill(role=Role.DRIVER, phase=rng.choice(list(Phase)), fraction=rng.random())
        for _ in range(3)
    ]
    whole, parts = ended(tmp_path / "whole", []), ended(tmp_path / "parts", kills)
    for a, b in zip(sampled(whole), sampled(parts), strict=True):
        assert a == b
    assert learnt(whole) == learnt(parts)
    assert any(step["grad_norm"] > 0 for step in learnt(whole))
    last = Path("checkpoints") / f"step_{STEPS}" / "huggingface" / "model.safetensors"
    expected, found = load_file(whole / last), load_file(parts / last)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (weight == found[name]).all(), name
