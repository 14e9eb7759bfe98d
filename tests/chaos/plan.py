"""Which process is killed in which phase of a run, and how a random plan comes from a seed.

Refuses to know how phases are recognised and how anything is killed (target.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import count, islice


class Role(StrEnum):
    """Whose process is killed."""

    ROLLOUT = "rollout worker"
    SCORER = "scorer"
    LEARNER = "learner rank"
    DRIVER = "driver"
    NODE = "node"  # one that the driver is not on: its raylet and all of its workers


class Phase(StrEnum):
    """When."""

    ADMISSION = "admission"
    GENERATION = "generation"
    SCORING = "scoring"
    BATCH = "batch building"
    OPTIMISER = "optimiser step"
    PUBLISH = "publish"
    LOAD = "load"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One SIGKILL: at the first moment of this phase after a step since the last kill."""

    role: Role
    phase: Phase
    fraction: float = 0.0  # of the time that the phase took last, so long after its beginning
    choice: int = 0  # which of several processes of the role


def in_every_phase(role: Role) -> list[Kill]:
    """Each phase once, half-way: of what it took the last time, which is little for some."""
    return [
        Kill(role=role, phase=phase, fraction=0.5, choice=number)
        for number, phase in enumerate(Phase)
    ]


def random_kills(seed: int, roles: Sequence[Role]) -> Iterator[Kill]:
    """Without end; the same for the same seed."""
    for number in count():
        rng = random.Random(f"{seed}/{number}")
        yield Kill(
            role=rng.choice(list(roles)),
            phase=rng.choice(list(Phase)),
            fraction=rng.random(),
            choice=rng.randrange(1000),
        )


def some_random_kills(seed: int, roles: Sequence[Role], number: int) -> list[Kill]:
    """The first so many of them."""
    return list(islice(random_kills(seed, roles), number))


def encoded(kills: Sequence[Kill]) -> str:
    """As JSON, for the process that is shot at."""
    return json.dumps([asdict(kill) for kill in kills])


def decoded(text: str) -> list[Kill]:
    """What `encoded` wrote."""
    return [
        Kill(**{**values, "role": Role(values["role"]), "phase": Phase(values["phase"])})
        for values in json.loads(text)
    ]
