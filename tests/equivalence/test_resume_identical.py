"""Resume equals uninterrupted: a run killed at three points has the same metrics and weights.

At staleness 0. Every figure of what was learnt must be equal bit for bit, not close.
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


def ended(folder: Path, kills: list[Kill], *, is_local: bool, **changes: object) -> Path:
    folder.mkdir()
    attack = Attack(
        folder=folder,
        kills=kills,
        changes={
            **SMALL,
            "steps": STEPS,
            "data.evaluation": folder / "data" / "heldout.jsonl",
            "evaluation.prompts": 8,
            "evaluation.every": 2,
            "checkpoint.every": 1,
            "learner.learning_rate": 1e-3,
            **changes,
        },
        is_local=is_local,
    )
    assert attack.carry_on() == 0, attack.told()
    assert len(attack.killed) == len(kills), attack.told()
    assert attack.run is not None
    whole_ledger(attack.run)
    return attack.run


def learnt(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of steps and evaluations."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    figures = [
        {name: value for name, value in line.items() if not name.startswith(OTHERS)}
        for line in lines
    ]
    return [line for line in figures if line.keys() > {"step"}]


def sampled(run: Path) -> list[object]:
    """Tokens and log-probabilities of every group, in the order of training."""
    lines = map(json.loads, (run / "groups.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["group"], line["rollouts"]) for line in lines]


def random_kills(*roles: Role) -> list[Kill]:
    rng = random.Random(SEED)
    return [Kill(role=role, phase=rng.choice(list(Phase)), fraction=rng.random()) for role in roles]


def same_to_the_last_bit(whole: Path, parts: Path) -> None:
    for a, b in zip(sampled(whole), sampled(parts), strict=True):
        assert a == b
    assert learnt(whole) == learnt(parts)
    assert any(step.get("grad_norm", 0) > 0 for step in learnt(whole))
    last = Path("checkpoints") / f"step_{STEPS}" / "huggingface" / "model.safetensors"
    expected, found = load_file(whole / last), load_file(parts / last)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (weight == found[name]).all(), name


def test_a_run_killed_at_three_random_points_ends_with_the_same_metrics_and_weights(
    tmp_path: Path,
) -> None:
    kills = random_kills(Role.DRIVER, Role.DRIVER, Role.DRIVER)
    whole = ended(tmp_path / "whole", [], is_local=True)
    same_to_the_last_bit(whole, ended(tmp_path / "parts", kills, is_local=True))


@pytest.mark.ray
def test_the_same_of_actors_whose_learner_is_lost_too(tmp_path: Path) -> None:
    kills = random_kills(Role.DRIVER, Role.LEARNER, Role.DRIVER)
    whole = ended(tmp_path / "whole", [], is_local=False)
    same_to_the_last_bit(whole, ended(tmp_path / "parts", kills, is_local=False))
