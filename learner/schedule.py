"""The learning rate of a step. Refuses to know the optimiser: it is a function of the step."""

from __future__ import annotations

import math

from learner.config import LearnerConfig


def learning_rate_at(step: int, *, total_steps: int, config: LearnerConfig) -> float:
    """Learning rate of step `step`, counted from 0; the updates of one step share it.

    Warm-up reaches the full rate in `warmup_steps` steps and its first step already learns.
    10 steps, no warm-up, linear: 1.0, 0.9, ..., 0.1 of the rate.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying)
    match config.lr_scheduler_type:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * factor
