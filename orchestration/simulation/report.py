"""What a simulated run found, and which part of it to change first.

Pure functions of figures; refuses to know how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BUSY = 0.9  # a pool that works this share of the time limits the step


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """Seconds are simulated unless they say CPU; means are over the steps after `warm_up_steps`."""

    workers: int
    places: int  # rollouts that all workers generate at a time
    max_rollouts: int  # that the staleness bound lets be under way
    max_staleness: int
    steps: int
    warm_up_steps: int
    trained_groups: int
    trained_rollouts: int
    dropped_groups: int
    unfinished_groups: int  # under way when the last step ended
    num_replaced: Mapping[str, int]  # workers that missed a deadline, by role
    wall_s: float
    step_s: float
    generation_s: float  # of a step's rollouts, were all places taken all the time
    learning_s: float  # of a step
    scoring_s: float  # of a step's groups, were all actors of the slowest scorer busy
    group_waits_s: float  # of a group, from its scores to the step that trains on it
    staleness_mean: float
    staleness_max: float
    driver_cpu_s: float  # of the whole run, without what the simulated roles cost
    peak_memory_mib: float

    @property
    def rollout_busy(self) -> float:
        """Share of the places' time in which a rollout was generated."""
        return self.generation_s / self.step_s

    @property
    def learner_busy(self) -> float:
        """Share of the time in which the learner computed."""
        return self.learning_s / self.step_s

    @property
    def learner_waits_s(self) -> float:
        """Of a step: for groups, publishing and loading."""
        return self.step_s - self.learning_s

    @property
    def efficiency(self) -> float:
        """step_s / max(generation_s, learning_s); 1 is ideal."""
        return self.step_s / max(self.generation_s, self.learning_s)

    @property
    def driver_us_per_rollout(self) -> float:
        """CPU microseconds of one trained rollout, from its request to its row."""
        return 1e6 * self.driver_cpu_s / self.trained_rollouts

    @property
    def rollouts_per_cpu_s(self) -> float:
        """What one core of the driver sustains."""
        return self.trained_rollouts / self.driver_cpu_s

    @property
    def driver_step_s(self) -> float:
        """CPU seconds of the driver in a step."""
        return self.driver_cpu_s / self.steps


def advice(found: SimulationReport) -> str:
    """Which part limits the step, and what would change that."""
    longer = max(found.generation_s, found.learning_s)
    if found.driver_step_s > found.step_s:
        return (
            f"the driver limits the step: it computes {found.driver_step_s:.3g} s for each, which "
            f"lasts {found.step_s:.3g} s here; fewer or longer rollouts in a step cost it less"
        )
    if found.scoring_s > BUSY * found.step_s:
        return (
            f"a scorer limits the step: its actors are busy for {found.scoring_s:.3g} s of "
            f"{found.step_s:.3g} s; raise its `actors`"
        )
    if found.learner_busy >= BUSY:
        return (
            f"the learner limits the step: it trains for {found.learning_s:.3g} s of "
            f"{found.step_s:.3g} s, and rollout workers are busy for {found.rollout_busy:.0%}; "
            f"more ranks help, more workers do not{_balanced(found)}"
        )
    if found.max_rollouts < found.places:
        return (
            f"too few rollouts limit the step: {found.workers} workers have {found.places} places, "
            f"and at most {found.max_rollouts} rollouts are under way; raise num_prompts_per_step "
            "or max_staleness, or use fewer workers"
        )
    if found.rollout_busy >= BUSY:
        return (
            f"rollout workers limit the step: they generate for {found.generation_s:.3g} s of "
            f"{found.step_s:.3g} s, and the learner is busy for {found.learner_busy:.0%}"
            f"{_balanced(found)}"
        )
    if found.max_staleness == 0:
        return (
            f"generation ({found.generation_s:.3g} s and its longest rollouts) and learning "
            f"({found.learning_s:.3g} s) take turns: with max_staleness: 1 they overlap, and a "
            f"step of {found.step_s:.3g} s can come down to {longer:.3g} s"
        )
    return (
        f"long rollouts hold the step up: it takes {found.step_s:.3g} s, generation alone "
        f"{found.generation_s:.3g} s and learning alone {found.learning_s:.3g} s; raise "
        "max_staleness, which gives them a step more, or num_prompts_per_step"
    )


def _balanced(found: SimulationReport) -> str:
    """The number of workers with which generation takes as long as learning."""
    workers = max(1, round(found.workers * found.generation_s / found.learning_s))
    if workers == found.workers:
        return ""
    return f"; {workers} worker{'s' if workers > 1 else ''} would generate as fast as it learns"
