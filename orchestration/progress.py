"""How far a run shall go and how far it has come: the schedule, and all that a checkpoint needs.

Refuses to know the loops that work on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.pipeline import State
from grpo.types import TrainRow
from orchestration.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How much of what, and when to give up."""

    steps: int
    groups_per_step: int  # P, sampled for each step
    replayed_per_step: int = 0  # groups of earlier steps that are trained on once more
    replay_steps: int = 0  # of so many steps
    updates_per_step: int
    epochs_per_step: int = 1
    max_staleness: int  # S
    window: int  # W
    checkpoint_every: int  # 0: only at the end
    evaluate_every: int  # 0: not during training
    max_log_prob_gap: float
    max_dropped_rate: float
    max_steps_without_signal: int
    take_deadline_s: float
    train_deadline_s: float
    sync_deadline_s: float


def planned_schedule(recipe: Recipe) -> Schedule:
    """What the recipe asks of the driver."""
    return Schedule(
        steps=recipe.steps,
        groups_per_step=recipe.sampled_per_step,
        replayed_per_step=recipe.replayed_per_step,
        replay_steps=recipe.replay.steps,
        updates_per_step=recipe.updates_per_step,
        epochs_per_step=recipe.epochs_per_step,
        max_staleness=recipe.max_staleness,
        window=recipe.window,
        checkpoint_every=recipe.checkpoint.every,
        evaluate_every=recipe.evaluation.every if recipe.data.evaluation else 0,
        max_log_prob_gap=recipe.alarms.log_prob_gap,
        max_dropped_rate=recipe.alarms.dropped_rate,
        max_steps_without_signal=recipe.alarms.steps_without_signal,
        take_deadline_s=recipe.alarms.stall_s,
        train_deadline_s=recipe.alarms.stall_s,
        sync_deadline_s=recipe.alarms.stall_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """Where a run stands between two steps."""

    step: int = 0
    version: int = 0
    next_group: int = 0
    pending: tuple[int, ...] = ()  # admitted before, not trained on: to be sampled again
    algorithm_state: State = None
    num_tokens: int = 0  # of all completions so far, those of dropped groups included
    stage_rows: tuple[TrainRow, ...] = ()  # what the steps left for `Pipeline.stage`
