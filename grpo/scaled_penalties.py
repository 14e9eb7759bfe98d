"""Penalties whose coefficient follows their own mean over an update (`Penalty.scale`).

The mean is a sum over all rows of the update, which no micro-batch sees: sums are taken first,
added up, and put into the coefficients. Refuses to know how rows are packed and shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from grpo.objective import LossInputs, Objective


def has_scales(objective: Objective) -> bool:
    """Whether any coefficient has to be found anew for each update."""
    return any(penalty.scale is not None for penalty in objective.penalties)


def scaled_penalty_sums(objective: Objective, inputs: LossInputs) -> dict[str, float]:
    """What these rows add to the mean of each penalty that has a scale."""
    return {
        penalty.name: (inputs.weights * penalty.fn(inputs)).detach().double().sum().item()
        for penalty in objective.penalties
        if penalty.scale is not None
    }


def with_scales(objective: Objective, parts: Iterable[Mapping[str, float]]) -> Objective:
    """The objective with every scale put into its coefficient, from the sums of all rows.

    Coefficient 1000, scale max(mean - 0.0001, 0), sums 0.004 and 0.006: coefficient 9.9.
    """
    means: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            means[name] = means.get(name, 0.0) + value
    penalties = tuple(
        penalty
        if penalty.scale is None
        else replace(
            penalty,
            coefficient=penalty.coefficient * penalty.scale(means.get(penalty.name, 0.0)),
            scale=None,
        )
        for penalty in objective.penalties
    )
    return replace(objective, penalties=penalties)
