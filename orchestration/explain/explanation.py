"""From given groups to everything that a step of an algorithm would make of them.

The driver's half is `workings` and `build_batch`, the learner's `loss_and_metrics`: the very code
of training. Refuses to know the form of the input file and the screen.
Shapes: T tokens, G rollouts of a group, K reward terms, P groups that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from grpo.batch import Workings, build_batch, workings
from grpo.describe import term_names
from grpo.errors import UserError
from grpo.objective import Objective
from grpo.pipeline import Pipeline, State
from grpo.types import Dropped, Float32, Group, Rollout, Span, StepReport, TrainRow
from orchestration.checkpoint import decoded_state
from orchestration.explain.loss import (
    RowInput,
    RowNumbers,
    Streams,
    UpdateNumbers,
    measured,
    update_numbers,
)
from orchestration.group_file import behaviour, current, groups_of, proximal, stream
from orchestration.group_schema import BatchInput, RolloutInput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupVerdict:
    """Whether a group would be trained on, and with which of its rollouts."""

    given: Group
    kept: Group | None  # with the rollouts that the selection left
    dropped: Dropped | None
    places: tuple[int, ...]  # of the kept rollouts among the given ones
    unscored: tuple[tuple[str, Span], ...]  # what scorers would be asked before it is trained on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageUpdate:
    """An update of the second stage: its rows as the groups left them."""

    rows: Sequence[TrainRow]
    numbers: UpdateNumbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """Every number, in the order of the steps. Lists over groups run over the kept ones."""

    verdicts: tuple[GroupVerdict, ...]
    terms: tuple[str, ...]  # K names
    state: State
    found: Workings | None  # None: no group was kept
    rows: list[list[RowNumbers]]  # P times [G]
    updates: tuple[UpdateNumbers, ...]
    metrics: Mapping[str, float]
    next_state: State
    learnable: tuple[float, float] | None  # before and after
    stage: StageUpdate | None

    @property
    def loss(self) -> float:
        """The mean over the updates, as the metric `loss`."""
        return float(np.mean([u.loss for u in self.updates])) if self.updates else 0.0


def explained(pipeline: Pipeline, objective: Objective, batch: BatchInput) -> Explanation:
    """One step on these groups; UserError where they lack what the algorithm reads."""
    state = _state(pipeline, batch)
    given = groups_of(batch)
    streams = [
        [_streams(r, g) for r, g in zip(*pair, strict=True)] for pair in _pairs(batch, given)
    ]
    verdicts = tuple(_verdict(pipeline, group, state) for group in given)
    kept = [place for place, verdict in enumerate(verdicts) if verdict.kept is not None]
    of_kept = [[streams[g][place] for place in verdicts[g].places] for g in kept]
    groups = [
        _measured(pipeline, objective, _kept(verdicts[g]), rows, state, batch)
        for g, rows in zip(kept, of_kept, strict=True)
    ]
    before = None if objective.learnable is None else objective.learnable.initial
    if before is not None and batch.learnable is not None:
        before = batch.learnable
    nothing = Explanation(
        verdicts=verdicts,
        terms=tuple(term_names(pipeline.rewards)),
        state=state,
        found=None,
        rows=[],
        updates=(),
        metrics={},
        next_state=state,
        learnable=None if before is None else (before, before),
        stage=None,
    )
    return nothing if not groups else _trained(pipeline, objective, batch, groups, of_kept, nothing)


def _trained(
    pipeline: Pipeline,
    objective: Objective,
    batch: BatchInput,
    groups: Sequence[Group],
    streams: Sequence[Sequence[Streams]],
    start: Explanation,
) -> Explanation:
    state = start.state
    if batch.updates_per_step > len(groups):
        raise UserError(
            f"updates_per_step is {batch.updates_per_step}, but {len(groups)} of "
            f"{len(batch.groups)} groups are kept: an update needs a whole group"
        )
    found = workings(pipeline, groups, state, num_updates=batch.updates_per_step)
    built = build_batch(
        pipeline,
        groups,
        state,
        step=batch.step,
        version=batch.version,
        num_updates=batch.updates_per_step,
    )
    rows = [_row_inputs(found, place, of_group) for place, of_group in enumerate(streams)]
    updates: list[UpdateNumbers] = []
    value = None if start.learnable is None else start.learnable[0]
    for part in found.parts:
        flat = [row for of_group in rows[part] for row in of_group]
        updates.append(update_numbers(objective, flat, value))
        value = updates[-1].learnable
    learnt = _means([update.metrics for update in updates])
    if objective.learnable is not None and value is not None:
        learnt[objective.learnable.name] = value
    report = StepReport(metrics=learnt, timings_s={})
    numbers = [row for update in updates for row in update.rows]
    ends = np.cumsum([len(of_group) for of_group in rows])
    return replace(
        start,
        found=found,
        rows=[numbers[end - len(of_group) : end] for end, of_group in zip(ends, rows, strict=True)],
        updates=tuple(updates),
        metrics={**built.metrics, **learnt},
        next_state=pipeline.adapt(state, found.rewarded, report),
        learnable=None if start.learnable is None or value is None else (start.learnable[0], value),
        stage=_stage(pipeline, objective, found, streams, state),
    )


def _state(pipeline: Pipeline, batch: BatchInput) -> State:
    """As the file gives it, in the form of a checkpoint; else the first."""
    if batch.state is None:
        return pipeline.initial_state
    if pipeline.initial_state is None:
        raise UserError(
            f"the file gives a state, {batch.state!r:.60}, but the algorithm keeps none"
        )
    try:
        return decoded_state(pipeline.initial_state, batch.state)
    except ValueError as error:
        raise UserError(
            f"the state does not fit the algorithm ({error}); its first state is "
            f"{pipeline.initial_state!r}"
        ) from error


def _pairs(
    batch: BatchInput, groups: Sequence[Group]
) -> list[tuple[tuple[RolloutInput, ...], tuple[Rollout, ...]]]:
    return [(a.rollouts, b.rollouts) for a, b in zip(batch.groups, groups, strict=True)]


def _streams(item: RolloutInput, rollout: Rollout) -> Streams:
    size, start = item.num_tokens, proximal(item)
    none = np.zeros(0)
    return Streams(
        tokens=rollout.tokens,
        origins=rollout.origins,
        behaviour=behaviour(item),
        proximal=start,
        current=current(item),
        reference=stream(item.reference_log_probs, size, start),
        entropy=None if item.entropy is None else stream(item.entropy, size, none),
        hidden=None if item.hidden is None else np.array(item.hidden, np.float64),
        is_cross_context=rollout.train_context is not None,
    )


def _verdict(pipeline: Pipeline, group: Group, state: State) -> GroupVerdict:
    """As `group_task` decides, on rollouts and scores that are there already."""
    outcome: Group | Dropped | None = None
    for skip in pipeline.skip:
        reason = skip(group.prompt, state)
        if reason is not None and outcome is None:
            outcome = _dropped(group, reason, "nothing would be sampled", is_planned=True)
    unscored: list[tuple[str, Span]] = []
    if outcome is None:
        names = tuple(dict.fromkeys(score.scorer for score in group.scores))
        wanted = pipeline.spans(group, names) if names else {}
        unscored = [(name, span) for name, spans in wanted.items() for span in spans]
        failed = next((score for score in group.scores if score.failure is not None), None)
        if failed is not None:
            detail = f"scorer {failed.scorer!r}, rollout {failed.span.rollout}: {failed.failure}"
            outcome = _dropped(group, "failed_score", detail)
    if outcome is None:
        outcome = group
        for select in pipeline.select:
            outcome = select(outcome, state)
            if isinstance(outcome, Dropped):
                break
    place_of = {id(rollout.tokens): place for place, rollout in enumerate(group.rollouts)}
    kept = outcome if isinstance(outcome, Group) else None
    return GroupVerdict(
        given=group,
        kept=kept,
        dropped=outcome if isinstance(outcome, Dropped) else None,
        places=() if kept is None else tuple(place_of[id(r.tokens)] for r in kept.rollouts),
        unscored=tuple(unscored),
    )


def _dropped(group: Group, reason: str, detail: str, *, is_planned: bool = False) -> Dropped:
    return Dropped(
        group=group.id,
        prompt=group.prompt.id,
        reason=reason,
        detail=detail,
        is_planned=is_planned,
    )


def _kept(verdict: GroupVerdict) -> Group:
    assert verdict.kept is not None
    return verdict.kept


def _measured(
    pipeline: Pipeline,
    objective: Objective,
    group: Group,
    streams: Sequence[Streams],
    state: State,
    batch: BatchInput,
) -> Group:
    """The group with every stream that the pipeline asks the learner for."""
    layer = None if batch.output_layer is None else np.array(batch.output_layer, np.float64)
    how = {measure.name: measure for measure in objective.measures}
    for wanted in pipeline.measures:
        if all(wanted.name in rollout.measured for rollout in group.rollouts):
            continue
        labels = np.full(len(group.rollouts), np.nan)
        if wanted.labels is not None:
            labels = wanted.labels(group, state)
        values = measured(how[wanted.name], streams, labels, layer)
        rollouts = tuple(
            replace(rollout, measured={**rollout.measured, wanted.name: cast(Float32, value)})
            for rollout, value in zip(group.rollouts, values, strict=True)
        )
        group = replace(group, rollouts=rollouts)
    return group


def _row_inputs(found: Workings, place: int, streams: Sequence[Streams]) -> list[RowInput]:
    group = found.rewarded[place].group
    columns = zip(
        streams,
        found.advantages[place],
        found.weights[place],
        found.policy_weights[place],
        strict=True,
    )
    return [
        RowInput(
            group=group.id,
            streams=of_row,
            advantages=np.asarray(advantages, np.float64),
            weights=np.asarray(weights, np.float64),
            policy_weights=np.asarray(policy_weights, np.float64),
        )
        for of_row, advantages, weights, policy_weights in columns
    ]


def _stage(
    pipeline: Pipeline,
    objective: Objective,
    found: Workings,
    streams: Sequence[Sequence[Streams]],
    state: State,
) -> StageUpdate | None:
    """What these rows add to an update of the second stage, if it came now."""
    if pipeline.stage is None or objective.stage is None:
        return None
    rows: list[TrainRow] = []
    inputs: list[RowInput] = []
    for rewarded, of_group in zip(found.rewarded, streams, strict=True):
        for row in pipeline.stage.collect(rewarded, state):
            rows.append(row)
            inputs.append(_stage_input(row, of_group))
    if not rows:
        return None
    return StageUpdate(rows=rows, numbers=update_numbers(objective.stage, inputs, None))


def _stage_input(row: TrainRow, streams: Sequence[Streams]) -> RowInput:
    """A stage's row is a rollout of its group, or the beginning of one."""
    size = len(row.tokens)
    source = next(s for s in streams if np.array_equal(s.tokens[:size], row.tokens))
    return RowInput(
        group=row.group,
        streams=source.first(size),
        advantages=row.advantages.astype(np.float64),
        weights=row.weights.astype(np.float64),
        policy_weights=row.policy_weights.astype(np.float64),
    )


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
