"""Which of a recipe's scorers says whether the task is solved, and which only judges steps.

Refuses to know any algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping


def task_scorer(outcomes: Mapping[str, float], *, named: str | None, setting: str) -> str:
    """The scorer that `setting` names, or the one of the largest weight, the first of equals."""
    if not outcomes:
        raise ValueError(
            "every scorer of the recipe judges steps: add one that judges whole answers, for "
            "example {name: answer, rule: numeric}"
        )
    if named is None:
        return max(outcomes, key=lambda scorer: outcomes[scorer])
    _require(named, outcomes, setting)
    return named


def without_step_scorer(
    outcomes: Mapping[str, float], *, named: str | None, setting: str
) -> dict[str, float]:
    """The scorers of whole answers: all but the one that `setting` names as judge of steps."""
    if named is None:
        return dict(outcomes)
    _require(named, outcomes, setting)
    return {scorer: weight for scorer, weight in outcomes.items() if scorer != named}


def _require(named: str, outcomes: Mapping[str, float], setting: str) -> None:
    if named not in outcomes:
        raise ValueError(
            f"algorithm.{setting} is {named!r}, but the recipe has no scorer of that name (found: "
            f"{', '.join(outcomes)}): add it under scorers, or name one of these"
        )
