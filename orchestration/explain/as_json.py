"""An explanation as JSON values, for programs; numbers are not rounded, NaN becomes null."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from grpo.types import Rollout
from orchestration.checkpoint import encoded_state
from orchestration.explain.explanation import Explanation, GroupVerdict, StageUpdate
from orchestration.explain.loss import RowNumbers
from orchestration.group_file import token_texts

Json = Any


def explanation_json(found: Explanation) -> dict[str, Json]:
    """Groups with their rollouts and tokens, updates, metrics and the state before and after."""
    place = {id(verdict): -1 for verdict in found.verdicts}
    kept = [verdict for verdict in found.verdicts if verdict.kept is not None]
    place |= {id(verdict): number for number, verdict in enumerate(kept)}
    groups = [_group(found, verdict, place[id(verdict)]) for verdict in found.verdicts]
    ids = [verdict.given.id for verdict in kept]
    parts = [] if found.found is None else found.found.parts
    result = {
        "loss": found.loss,
        "groups": groups,
        "updates": [
            {"groups": ids[part], "loss": update.loss, "metrics": dict(update.metrics)}
            for part, update in zip(parts, found.updates, strict=True)
        ],
        "metrics": dict(found.metrics),
        "state": encoded_state(found.state),
        "next_state": encoded_state(found.next_state),
        "learnable": None
        if found.learnable is None
        else {"value": found.learnable[0], "next_value": found.learnable[1]},
        "stage": None if found.stage is None else _stage(found.stage),
    }
    return {key: plain(value) for key, value in result.items()}


def plain(value: Json) -> Json:
    """Numbers, text, lists and mappings alone; what is no number becomes null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _group(found: Explanation, verdict: GroupVerdict, place: int) -> Json:
    group, dropped = verdict.given, verdict.dropped
    rollouts = []
    for number, rollout in enumerate(group.rollouts):
        record = {"rollout": number, "tokens": rollout.tokens, "texts": token_texts(rollout)}
        record["kept"] = number in verdict.places
        if record["kept"]:
            record |= _rollout(found, place, verdict.places.index(number))
        rollouts.append(record)
    return {
        "group": group.id,
        "prompt": group.prompt.id,
        "kept": dropped is None,
        "dropped": None
        if dropped is None
        else {
            "reason": dropped.reason,
            "detail": dropped.detail,
            "is_planned": dropped.is_planned,
        },
        "unscored": [
            {"scorer": scorer, "rollout": span.rollout, "start": span.start, "end": span.end}
            for scorer, span in verdict.unscored
        ],
        "loss": sum(float(row.loss.sum()) for row in found.rows[place]) if place >= 0 else 0.0,
        "rollouts": rollouts,
    }


def _rollout(found: Explanation, place: int, number: int) -> dict[str, Json]:
    assert found.found is not None
    workings, row = found.found, found.rows[place][number]
    rewarded = workings.rewarded[place]
    components = rewarded.components[number]
    rollout: Rollout = rewarded.group.rollouts[number]
    advantages = workings.advantages[place][number]
    return {
        "rewards": dict(zip(found.terms, components.tolist(), strict=True)),
        "reward": float(rewarded.rewards[number]),
        "advantage": float(np.mean(advantages)) if len(advantages) else 0.0,
        "measured": dict(rollout.measured),
        "advantages": advantages,
        "trained": workings.masks[place][number],
        "token_weights": workings.policy_weights[place][number],
        "loss_weights": workings.loss_weights[place][number],
        "means": workings.means[place][number],
        "coefficients": workings.weights[place][number],
        **_objective_columns(row),
    }


def _objective_columns(row: RowNumbers) -> dict[str, Json]:
    return {
        "learner_advantages": row.advantages,
        "learner_weights": row.policy_weights,
        "log_ratios": row.log_ratios,
        "clipped_low": row.clipped_low,
        "clipped_high": row.clipped_high,
        "surrogate": row.surrogate,
        "gates": row.gates,
        "penalties": dict(row.penalties),
        "token_loss": row.loss,
        "loss": float(row.loss.sum()),
        "gradient": row.gradient,
        "entropy_gradient": row.entropy_gradient,
    }


def _stage(stage: StageUpdate) -> Json:
    """The second stage's update, on the rows that these groups leave to it."""
    pairs = zip(stage.rows, stage.numbers.rows, strict=True)
    rows = [
        {
            "unit": row.group,
            "tokens": row.tokens,
            "advantages": row.advantages,
            "coefficients": row.weights,
            **_objective_columns(numbers),
        }
        for row, numbers in pairs
    ]
    return {"loss": stage.numbers.loss, "metrics": dict(stage.numbers.metrics), "rows": rows}
