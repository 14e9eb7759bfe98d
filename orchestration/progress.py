"""How far a run shall go and how far it has come: the schedule, and all that a checkpoint needs.

Refuses to know the loops that work on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.pipeline import State
from grpo.types import TrainRow


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
