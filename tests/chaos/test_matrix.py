"""SIGKILL for every role in every phase of a real run through Ray: nothing is lost or done twice.

Deselected unless asked for: `make chaos`. A short selection runs with the other tests
(test_short.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.attacked import SMALL, Attack, whole_ledger
from tests.chaos.nodes import cluster_of
from tests.chaos.plan import Kill, Phase, Role, in_every_phase

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 40  # a kill needs two or three; those at a checkpoint wait for one


def attacked(folder: Path, role: Role, **changes: object) -> Attack:
    return Attack(
        folder=folder, kills=in_every_phase(role), changes={**SMALL, "steps": STEPS, **changes}
    )


def survived(attack: Attack) -> None:
    status = attack.carry_on()
    assert status == 0, attack.told()
    assert [killed["phase"] for killed in attack.killed] == list(Phase), attack.told()
    assert attack.run is not None
    whole_ledger(attack.run)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_rollout_worker_killed_in_every_phase(tmp_path: Path, staleness: int) -> None:
    survived(attacked(tmp_path, Role.ROLLOUT, max_staleness=staleness))


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_scorer_killed_in_every_phase(tmp_path: Path, staleness: int) -> None:
    survived(attacked(tmp_path, Role.SCORER, max_staleness=staleness))


@pytest.mark.parametrize("staleness", [0, 1])
def test_one_learner_rank_of_two_killed_in_every_phase(tmp_path: Path, staleness: int) -> None:
    """The run itself goes on each time: nobody resumes it."""
    changes = {"learner.backend": "deepspeed", "learner.ranks": 2, "rollout.workers": 1}
    survived(attacked(tmp_path, Role.LEARNER, max_staleness=staleness, **changes))


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_driver_killed_in_every_phase(tmp_path: Path, staleness: int) -> None:
    survived(attacked(tmp_path, Role.DRIVER, max_staleness=staleness, **{"rollout.workers": 1}))


def test_a_node_killed_in_every_phase_while_another_one_comes(tmp_path: Path) -> None:
    with cluster_of(3) as cluster:
        attack = attacked(tmp_path, Role.NODE, max_staleness=1, **{"rollout.workers": 3})
        attack.environment = {"RAY_ADDRESS": cluster.address}
        attack.on_kill = lambda killed: cluster.add_node(wait=False, num_cpus=3)
        survived(attack)


def test_a_lost_node_whose_place_others_have_room_for(tmp_path: Path) -> None:
    with cluster_of(3, 3) as cluster:
        attack = Attack(
            folder=tmp_path,
            kills=[Kill(role=Role.NODE, phase=Phase.GENERATION, fraction=0.5)],
            changes={**SMALL, "steps": 12, "max_staleness": 1, "rollout.workers": 3},
            environment={"RAY_ADDRESS": cluster.address},
        )
        assert attack.carry_on() == 0, attack.told()
        assert len(attack.killed) == 1, attack.told()
        assert attack.run is not None
        whole_ledger(attack.run)
