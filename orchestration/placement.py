"""What the roles of a recipe need, and whether a cluster has it. Refuses to start anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestration.config import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one role asks of the cluster: `actors` times this many CPUs and GPUs."""

    role: str
    actors: int
    cpus: float
    gpus: float


def demands(recipe: Recipe) -> list[Demand]:
    """One entry per role, in the order of the recipe."""
    rollout, learner = recipe.rollout, recipe.learner
    scorers = [
        Demand(
            role=f"scorer {s.name}",
            actors=s.actors,
            cpus=s.cpus_per_actor,
            gpus=s.gpus_per_actor,
        )
        for s in recipe.scorers
    ]
    return [
        Demand(
            role="rollout worker",
            actors=rollout.workers,
            cpus=rollout.cpus_per_worker,
            gpus=rollout.gpus_per_worker,
        ),
        *scorers,
        Demand(
            role="learner rank",
            actors=learner.ranks,
            cpus=learner.cpus_per_rank,
            gpus=learner.gpus_per_rank,
        ),
    ]


def total(recipe: Recipe) -> tuple[float, float]:
    """(CPUs, GPUs) of all roles together."""
    rows = demands(recipe)
    return sum(d.actors * d.cpus for d in rows), sum(d.actors * d.gpus for d in rows)


def shortage(recipe: Recipe, resources: Mapping[str, float]) -> str | None:
    """What the cluster lacks, as one sentence; None if all roles fit by their sums."""
    cpus, gpus = total(recipe)
    has_cpus, has_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if cpus <= has_cpus and gpus <= has_gpus:
        return None
    rows = ", ".join(
        f"{d.actors} x {d.role} ({d.cpus:g} CPU, {d.gpus:g} GPU)" for d in demands(recipe)
    )
    return (
        f"the recipe needs {cpus:g} CPUs and {gpus:g} GPUs ({rows}), the cluster has "
        f"{has_cpus:g} and {has_gpus:g}: add nodes, or lower workers, actors or ranks"
    )
