"""Groups that are trained on more than once: a share of each step comes from the steps before it.

Draws by seed and step alone. Nothing is saved: after a resume the memory fills again. Refuses to
know what a group is worth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestration.group_task import FinishedGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepGroups:
    """The groups of one step, in the order in which updates are cut from them."""

    groups: tuple[FinishedGroup, ...]
    replayed: frozenset[int]  # ids of those that an earlier step has trained on

    @property
    def fresh(self) -> list[FinishedGroup]:
        """Trained on for the first time."""
        return [done for done in self.groups if done.group.id not in self.replayed]


class Replay:
    """Remembers the groups of the last steps and mixes some of them into the next one."""

    def __init__(self, *, count: int, steps: int, seed: int) -> None:
        """`count` groups a step, of the last `steps` steps; as many as there are at first."""
        self._count = count
        self._seed = seed
        self._memory: deque[Sequence[FinishedGroup]] = deque(maxlen=steps)

    def mixed(self, step: int, fresh: Sequence[FinishedGroup]) -> StepGroups:
        """The fresh groups and those drawn again, shuffled over the step's updates."""
        known = [done for groups in self._memory for done in groups]
        count = min(self._count, len(known))
        self._memory.append(fresh)
        if count == 0:
            return StepGroups(groups=tuple(fresh), replayed=frozenset())
        generator = np.random.default_rng([self._seed, step])
        drawn = [known[place] for place in generator.choice(len(known), count, replace=False)]
        everything = [*fresh, *drawn]
        return StepGroups(
            groups=tuple(everything[place] for place in generator.permutation(len(everything))),
            replayed=frozenset(done.group.id for done in drawn),
        )

    def metrics(self, mixed: StepGroups) -> dict[str, float]:
        """The share of the step that was drawn again; nothing where replay is off."""
        if self._count == 0:
            return {}
        return {"replay/share": len(mixed.replayed) / len(mixed.groups)}
