"""The two halves of a chosen algorithm, built and checked; the same checks that a recipe passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.algorithms.user_file import composition_problems, is_file_name, theirs_is_told
from grpo.combinations import combination_problems
from grpo.errors import UserError
from grpo.objective import Objective
from grpo.pipeline import Pipeline
from orchestration.group_file import groups_of, scorers_of
from orchestration.group_schema import BatchInput

if TYPE_CHECKING:
    from orchestration.chosen_algorithm import Chosen


def composed(chosen: Chosen, batch: BatchInput) -> tuple[Pipeline, Objective, dict[str, float]]:
    """Pipeline, objective and the weights of the scorers; UserError with every problem."""
    algorithm, settings = chosen.algorithm, chosen.settings
    outcomes = scorers_of(groups_of(batch), batch.weights)
    if not outcomes:
        raise UserError(
            "the groups have no score, so there is nothing to learn from: give outcomes or scores"
        )
    try:
        with theirs_is_told(algorithm.name, "cannot be built"):
            pipeline = algorithm.pipeline(
                settings, outcomes=outcomes, max_completion_length=batch.max_completion_length
            )
            objective = algorithm.objective(settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = (
        list(composition_problems(pipeline, objective)) if is_file_name(algorithm.name) else []
    )
    problems = problems or list(
        combination_problems(pipeline, objective, updates_per_step=batch.updates_per_step)
    )
    if problems:
        raise UserError("\n".join(f"{algorithm.name}: {problem}" for problem in problems))
    return pipeline, objective, outcomes
