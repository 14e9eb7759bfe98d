"""What an objective cannot ask of a learner, each with the remedy. Knows no algorithm by name."""

from __future__ import annotations

import math
from collections import Counter

from grpo.objective import Objective, Signal


def refuse_impossible(objective: Objective) -> None:
    """Raise ValueError if a learner could not do what the objective says."""
    _check_signals(objective)
    _check_learnable(objective)
    _check_reference_update(objective)
    if objective.stage is not None:
        _check_stage(objective.stage)


def needs_reference(objective: Objective) -> bool:
    """Whether the loss, that of the stage or a measure reads the reference policy."""
    stage = objective.stage
    needs = [objective.needs, *(measure.needs for measure in objective.measures)]
    needs += [] if stage is None else [stage.needs]
    return any(Signal.REFERENCE in of_one for of_one in needs)


def _check_signals(objective: Objective) -> None:
    if Signal.HIDDEN in objective.needs:
        raise ValueError(
            "the objective needs hidden states in its loss, but only a measure can read them: "
            "compute what depends on them in `measures`, and use it in the pipeline"
        )
    counts = Counter(measure.name for measure in objective.measures)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"the objective has several measures called {twice}: a rollout carries one stream per "
            "name, so give each its own"
        )


def _check_learnable(objective: Objective) -> None:
    learnable = objective.learnable
    if learnable is None:
        return
    rate = learnable.learning_rate
    if not (math.isfinite(learnable.initial) and 0 <= rate < math.inf):
        raise ValueError(
            f"the learnable {learnable.name} starts at {learnable.initial} with learning rate "
            f"{rate}: expected a finite start and a finite rate of at least 0"
        )


def _check_reference_update(objective: Objective) -> None:
    update = objective.reference_update
    if update is None:
        return
    if update.every < 1 or not 0 <= update.decay < 1:
        raise ValueError(
            f"the reference is to follow every {update.every} steps with decay {update.decay}: "
            "expected at least 1 step and a decay of at least 0 and below 1 (to keep the initial "
            "policy as reference, leave reference_update out)"
        )
    if not needs_reference(objective):
        raise ValueError(
            "the objective updates a reference that neither its loss nor a measure reads: add "
            "Signal.REFERENCE to the `needs` of what reads it, or leave reference_update out"
        )


def _check_stage(stage: Objective) -> None:
    own = {
        "measures": bool(stage.measures),
        "learnable": stage.learnable is not None,
        "reference_update": stage.reference_update is not None,
        "stage": stage.stage is not None,
    }
    found = [name for name, is_set in own.items() if is_set]
    if found:
        raise ValueError(
            f"the objective of a stage sets {found}: these belong to the learner as a whole, so "
            "set them on the algorithm's objective"
        )
    _check_signals(stage)
