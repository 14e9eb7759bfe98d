"""The halves of an algorithm at work on known groups: rows, loss and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np
import torch

from grpo.algorithms import ALGORITHMS
from grpo.batch import rows_of_groups, workings
from grpo.describe import described
from grpo.objective import LossInputs, Objective, loss_and_metrics
from grpo.pipeline import Pipeline
from grpo.types import Float32, Float64, Group, Rollout, TrainRow
from tests.unit.grpo_groups import LENGTHS, NEW, OLD, flat, loss_inputs, token_inputs


def halves(name: str, *, outcomes=None, length=96, **settings) -> tuple[Pipeline, Objective]:
    algorithm = ALGORITHMS[name]
    config = algorithm.config(**settings)
    pipeline = algorithm.pipeline(
        config, outcomes=outcomes or {"answer": 1.0}, max_completion_length=length
    )
    return pipeline, algorithm.objective(config)


def points(name: str, **settings) -> dict[str, list[str]]:
    return dict(described(*halves(name, **settings)))


def differing_points(left, right) -> set[str]:
    return {point for point in left if left[point] != right[point]}


def rows_of(pipeline: Pipeline, groups: Sequence[Group], state=None) -> list[TrainRow]:
    """A row for each rollout of one update over all groups, those of no weight included."""
    chosen = []
    for group in groups:
        for select in pipeline.select:
            group = select(group, state)
            assert isinstance(group, Group), group
        chosen.append(with_measures(pipeline, group))
    groups_rows = rows_of_groups(workings(pipeline, chosen, state, num_updates=1))
    return [row for rows in groups_rows for row in rows]


def with_measures(pipeline: Pipeline, group: Group) -> Group:
    """The group with every stream that the pipeline asks the learner for: chance, but the same for
    the same rollout. Streams that are there already stay."""
    return replace(
        group,
        rollouts=tuple(
            replace(rollout, measured=_streams(pipeline, rollout) | dict(rollout.measured))
            for rollout in group.rollouts
        ),
    )


def _streams(pipeline: Pipeline, rollout: Rollout) -> dict[str, Float32]:
    seed = crc32(rollout.log_probs.tobytes())
    return {
        measured.name: -np.random.default_rng(seed + place).random(rollout.num_tokens, np.float32)
        for place, measured in enumerate(pipeline.measures)
    }


def advantages_of(pipeline: Pipeline, groups: Sequence[Group], state=None) -> Float64:
    """One advantage per rollout of all groups: they are the same on every token."""
    rows = rows_of(pipeline, groups, state)
    for row in rows:
        assert len(set(row.advantages.tolist())) <= 1
    return np.array([row.advantages[0] for row in rows], np.float64)


def loss_and_gradient(objective: Objective, inputs: LossInputs) -> tuple[float, Float64]:
    """The loss and its gradient on every log-probability."""
    loss, _ = loss_and_metrics(objective, inputs)
    (gradient,) = torch.autograd.grad(loss, inputs.log_probs)
    return loss.item(), gradient.numpy()


def row_inputs(objective, rows, seed=0, *, spread=0.2) -> LossInputs:
    """Random log-probabilities around those that the rows were sampled with."""
    rng = np.random.default_rng(seed)
    behaviour = flat([row.behaviour_log_probs for row in rows])
    proximal = behaviour + rng.normal(0, spread, len(behaviour))
    now = torch.tensor(proximal + rng.normal(0, spread, len(behaviour)), requires_grad=True)
    reference = proximal + rng.normal(0, spread, len(behaviour))
    entropy = torch.tensor(rng.random(len(behaviour)))
    return loss_inputs(rows, log_probs=now, proximal=proximal, reference=reference, entropy=entropy)


def toy_inputs(advantages: Sequence[float], **streams) -> LossInputs:
    """The toy batch with one advantage per answer; every token weighs 1, four rows."""
    per_token = np.repeat(np.asarray(advantages, np.float64), LENGTHS)
    inputs = token_inputs(
        log_probs=torch.tensor(flat(NEW), requires_grad=True),
        proximal=flat(OLD),
        advantages=torch.tensor(per_token),
        **streams,
    )
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    return LossInputs(**{**_fields(inputs), "row": row, "num_rows": 4})


def _fields(inputs: LossInputs) -> dict[str, object]:
    return {name: getattr(inputs, name) for name in LossInputs.__dataclass_fields__}
