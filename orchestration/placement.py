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


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a cluster has, and what of it nobody has set aside."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


def room_of(has: Mapping[str, float], free: Mapping[str, float]) -> Room:
    """From resources by name; what is used up, or never was there, is absent."""
    return Room(
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
    )


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


def lack_of_room(now: Recipe, then: Recipe, room: Room) -> str | None:
    """Why the roles cannot grow from one recipe's sizes to the other's; None: they can, by sums.

    What shrinks in the same move makes room for what grows.
    """
    (cpus, gpus), (cpus_then, gpus_then) = total(now), total(then)
    more_cpus, more_gpus = max(0.0, cpus_then - cpus), max(0.0, gpus_then - gpus)
    if more_cpus <= room.free_cpus and more_gpus <= room.free_gpus:
        return None
    return (
        f"{more_cpus:g} CPUs and {more_gpus:g} GPUs more are needed; the cluster has {room.cpus:g} "
        f"CPUs ({room.cpus - room.free_cpus:g} in use) and {room.gpus:g} GPUs "
        f"({room.gpus - room.free_gpus:g} in use): ask for fewer, add nodes, or shrink another "
        "role in the same command"
    )
