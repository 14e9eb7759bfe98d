"""Combinations of points that make no sense, each with the reason and the remedy.

Reads which functions stand at the points; refuses to know any algorithm by name, so it judges a
user's composition as it judges ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from grpo import (
    aggregation,
    first_errors,
    penalties,
    ratios,
    step_preference,
    surrogates,
    token_weights,
)
from grpo.objective import Objective, Signal
from grpo.objective_checks import refuse_impossible
from grpo.pipeline import Pipeline

Function = Callable[..., object]

# One ratio for a whole answer, repeated on its tokens.
SEQUENCE_RATIOS: frozenset[Function] = frozenset(
    {
        ratios.sequence_mean_log_ratio,
        ratios.sequence_token_log_ratio,
        ratios.sequence_sum_log_ratio,
    }
)
REFERENCE_PENALTIES: frozenset[Function] = frozenset(
    {
        penalties.k2,
        penalties.k3,
        penalties.k3_plus,
        penalties.k3_unbiased,
        penalties.weighted_k3,
    }
)
# The ratio's value, not a comparison of ratio * advantage with its clipped form, makes these.
WEIGHT_SURROGATES: frozenset[Function] = frozenset(
    (surrogates.clipped_weight, surrogates.soft_gated)
)


def combination_problems(
    pipeline: Pipeline,
    objective: Objective,
    *,
    updates_per_step: int = 1,
    epochs_per_step: int = 1,
    is_replayed: bool = False,
) -> Iterator[str]:
    """What is wrong with points that are each right alone."""
    yield from _ratio_problems(pipeline, objective)
    if objective.surrogate is surrogates.log_likelihood and objective.group_term is None:
        yield from _update_problems(updates_per_step, epochs_per_step, is_replayed)
    yield from _reward_problems(pipeline)
    yield from _signal_problems(pipeline, objective)
    try:
        refuse_impossible(objective)
    except ValueError as error:
        yield str(error)
    if objective.stage is not None:
        yield from (f"the stage: {problem}" for problem in _need_problems(objective.stage))


def stands_at(point: object) -> frozenset[Function]:
    """Every function at a point, those inside settings of others included."""
    if isinstance(point, tuple):
        return frozenset().union(*(stands_at(item) for item in point))
    if isinstance(point, partial):
        settings = (*point.args, *point.keywords.values())
        return stands_at(point.func).union(*(stands_at(value) for value in settings))
    return frozenset({point}) if callable(point) else frozenset()


def _ratio_problems(pipeline: Pipeline, objective: Objective) -> Iterator[str]:
    ratio, means = stands_at(objective.log_ratio), stands_at(pipeline.aggregation)
    weights = stands_at((pipeline.token_weight, pipeline.loss_weight))
    sequence = ratio & SEQUENCE_RATIOS
    if sequence and aggregation.token_mean in means:
        yield (
            f"aggregation is token_mean, but {_name(sequence)} gives a whole answer one ratio: "
            "long answers would be clipped as one and yet weigh more; take sequence_mean"
        )
    if sequence and token_weights.trace_weights in weights:
        yield (
            f"trace_weights spread credit over tokens, but {_name(sequence)} gives a whole answer "
            "one ratio, so no token has one of its own; take token_log_ratio"
        )
    inside = stands_at(objective.surrogate) & WEIGHT_SURROGATES
    if ratios.weighted_log_ratio in ratio and inside:
        yield (
            f"weighted_log_ratio puts a token weight into the ratio before it is clipped, but "
            f"{_name(inside)} takes the ratio itself as weight, so the weight would act twice or "
            "be cut off unseen; place it outside as a gate, or take clipped"
        )


def _update_problems(updates: int, epochs: int, is_replayed: bool) -> Iterator[str]:
    """A log-likelihood is right for the policy that sampled, and for no later one."""
    found = {
        f"updates_per_step is {updates}": (updates > 1, "updates_per_step: 1"),
        f"epochs_per_step is {epochs}": (epochs > 1, "epochs_per_step: 1"),
        "replay.share is above 0": (is_replayed, "replay.share: 0"),
    }
    for setting, (is_set, remedy) in found.items():
        if is_set:
            yield (
                f"{setting}, but log_likelihood has no ratio that would notice how far the policy "
                f"has moved: set {remedy}, or choose an algorithm with a ratio"
            )


def _reward_problems(pipeline: Pipeline) -> Iterator[str]:
    rewards = stands_at(pipeline.rewards)
    if step_preference.step_preference in rewards and first_errors.stepwise_outcome in rewards:
        yield (
            "step_preference and stepwise_outcome both tell all-wrong groups apart, by steps cut "
            "in two ways, and one would hide the other: keep one of them"
        )


def _signal_problems(pipeline: Pipeline, objective: Objective) -> Iterator[str]:
    yield from _need_problems(objective)
    asked = {measured.name for measured in pipeline.measures}
    given = {measure.name for measure in objective.measures}
    for name in sorted(asked - given):
        yield (
            f"the pipeline measures {name!r}, but the objective does not say how: add a Measure of "
            "that name to its measures"
        )
    for name in sorted(given - asked):
        yield f"the objective can measure {name!r}, but the pipeline never asks: remove one"
    if (pipeline.stage is None) != (objective.stage is None):
        there, missing = ("pipeline", "objective") if pipeline.stage else ("objective", "pipeline")
        yield (
            f"the {there} has a stage and the {missing} has none: its rows need a loss, and its "
            "loss needs rows; give both or neither"
        )


def _need_problems(objective: Objective) -> Iterator[str]:
    """A term that reads what the learner was not asked to compute."""
    terms = stands_at(tuple(penalty.fn for penalty in objective.penalties))
    if terms & REFERENCE_PENALTIES and Signal.REFERENCE not in objective.needs:
        yield (
            f"{_name(terms & REFERENCE_PENALTIES)} reads the reference's log-probs, but needs is "
            f"{sorted(objective.needs)}: add Signal.REFERENCE"
        )
    if penalties.entropy in terms and Signal.ENTROPY not in objective.needs:
        yield (
            f"the penalty entropy reads the policy's entropy, but needs is "
            f"{sorted(objective.needs)}: add Signal.ENTROPY"
        )


def _name(functions: frozenset[Function]) -> str:
    return " and ".join(sorted(function.__name__ for function in functions))
