"""What the learner is asked about the groups of a step before their batch is built.

Refuses to know what a measure means and how the learner computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo.batch import plain_rows
from grpo.engines import Measuring
from grpo.pipeline import Labels, Pipeline, State
from grpo.types import Float32, Float64, Group, MeasureRequest


async def measured_groups(
    pipeline: Pipeline, learner: Measuring, groups: Sequence[Group], state: State
) -> list[Group]:
    """The groups with `rollout.measured` filled by what the pipeline wants to know, if anything."""
    streams: dict[str, list[list[Float32]]] = {}
    for request in measure_requests(pipeline, groups, state):
        streams |= await learner.measure(request)
    return [
        _with_streams(group, {name: values[place] for name, values in streams.items()})
        for place, group in enumerate(groups)
    ]


def measure_requests(
    pipeline: Pipeline, groups: Sequence[Group], state: State
) -> list[MeasureRequest]:
    """One request for all measures, and another for each further way to label rollouts."""
    names: dict[Labels | None, list[str]] = {}
    for measure in pipeline.measures:
        names.setdefault(measure.labels, []).append(measure.name)
    if None in names and len(names) > 1:  # a measure without labels is content with any
        unlabelled = names.pop(None)
        next(iter(names.values())).extend(unlabelled)
    rows = tuple(tuple(plain_rows(group)) for group in groups)
    return [
        MeasureRequest(
            names=tuple(wanted),
            groups=rows,
            labels=tuple(_labels(labels, group, state) for group in groups),
        )
        for labels, wanted in names.items()
    ]


def _labels(labels: Labels | None, group: Group, state: State) -> Float64:
    return np.full(len(group.rollouts), np.nan) if labels is None else labels(group, state)


def _with_streams(group: Group, streams: dict[str, list[Float32]]) -> Group:
    if not streams:
        return group
    rollouts = []
    for place, rollout in enumerate(group.rollouts):
        own = {name: values[place] for name, values in streams.items()}
        for name, values in own.items():
            assert len(values) == rollout.num_tokens, f"{name} of rollout {place}: {len(values)}"
        rollouts.append(replace(rollout, measured={**rollout.measured, **own}))
    return replace(group, rollouts=tuple(rollouts))
