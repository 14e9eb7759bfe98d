"""The most telling cases of test_matrix.py, and half a minute of soak.py, with the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.attacked import SMALL, Attack, whole_ledger
from tests.chaos.plan import Kill, Phase, Role
from tests.chaos.soak import Soak

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_loses_a_worker_a_scorer_and_a_learner_rank_in_turn(tmp_path: Path) -> None:
    kills = [
        Kill(role=Role.ROLLOUT, phase=Phase.GENERATION, fraction=0.5),
        Kill(role=Role.SCORER, phase=Phase.SCORING),
        Kill(role=Role.LEARNER, phase=Phase.OPTIMISER, fraction=0.5),
    ]
    changes = {**SMALL, "steps": 16, "max_staleness": 1}
    attack = Attack(folder=tmp_path, kills=kills, changes=changes)
    assert attack.carry_on() == 0, attack.told()
    assert [killed["role"] for killed in attack.killed] == [kill.role for kill in kills]
    assert attack.run is not None
    whole_ledger(attack.run)


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    """Its driver is killed, too, and resumed."""
    soak = Soak(tmp_path, minutes=0.5, seed=5, roles=(Role.ROLLOUT, Role.SCORER, Role.DRIVER))
    assert soak.run(), soak.problems
    assert soak.num_kills > 0
