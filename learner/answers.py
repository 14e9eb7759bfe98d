"""Answers to a MeasureRequest: streams that an algorithm computes over whole groups, no gradient.

Groups go to the ranks in turns, one group to each; within a turn all ranks run as many forward
passes, because ZeRO-3 gathers parameters in lock-step. Refuses to know what a measure is for.
T tokens of a completion, N of a micro-batch, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.errors import Fatal
from grpo.objective import Measure, MeasuredRow, OutputLayer, Signal
from grpo.types import Float32, Float64, MeasureRequest, Origin, TrainRow
from learner.packing import Block, blocks, idle
from learner.update import Trainee


@torch.no_grad()
def measured(trainee: Trainee, request: MeasureRequest) -> dict[str, list[list[Float32]]]:
    """By name, for each group, for each of its rows: [T]. The same on every rank."""
    chosen = [_measure(trainee.objective.measures, name) for name in request.names]
    needs = frozenset[Signal]().union(*(measure.needs for measure in chosen))
    mine: dict[tuple[str, int], list[Float32]] = {}
    with trainee.reference_at_hand(needs):
        for turn in turns(request.groups, ranks=trainee.ranks):
            own = turn[trainee.rank] if trainee.rank < len(turn) else None
            num_passes = max(len(_alone(trainee, request.groups[group])) for group in turn)
            group = request.groups[turn[0] if own is None else own]
            micro_batches = [] if own is None else _alone(trainee, group)
            micro_batches += [idle(group)] * (num_passes - len(micro_batches))
            found = _rows(trainee, micro_batches, needs, [] if own is None else request.labels[own])
            with _output_layer(trainee, needs) as layer:
                for measure in chosen if own is not None else ():
                    mine[measure.name, turn[trainee.rank]] = _answer(measure, found, layer)
    all_ranks = {k: v for part in trainee.backend.collect(mine) for k, v in part.items()}
    return {
        name: [all_ranks.get((name, group), []) for group in range(len(request.groups))]
        for name in request.names
    }


def turns(groups: Sequence[Sequence[TrainRow]], *, ranks: int) -> list[list[int]]:
    """Indices of groups that are computed at the same time, one per rank: alike in tokens.

    Tokens 10, 50, 20 on two ranks: [1, 2], [0]. A group without rows is left out.
    """
    tokens = [sum(row.num_tokens for row in group) for group in groups]
    order = sorted((i for i, count in enumerate(tokens) if count), key=lambda i: -tokens[i])
    return [order[start : start + ranks] for start in range(0, len(order), ranks)]


def _alone(trainee: Trainee, group: Sequence[TrainRow]) -> list[Block]:
    """A group's micro-batches, all of them for one rank."""
    return blocks(
        group,
        max_tokens=trainee.config.max_tokens_per_microbatch,
        rank=0,
        ranks=1,
        cost=trainee.row_cost,
    )


def _measure(measures: Sequence[Measure], name: str) -> Measure:
    for measure in measures:
        if measure.name == name:
            return measure
    known = ", ".join(measure.name for measure in measures) or "none"
    raise Fatal(f'the learner was asked to measure "{name}", but its objective measures {known}')


def _rows(
    trainee: Trainee,
    micro_batches: Sequence[Block],
    needs: frozenset[Signal],
    labels: Float64 | Sequence[float],
) -> list[MeasuredRow]:
    """The rows of this rank's group in order; every rank runs all its micro-batches."""
    found: dict[int, MeasuredRow] = {}
    for block in micro_batches:
        with trainee.room_for(block, "measuring pass"):
            outputs = list(
                trainee.backend.forward(
                    block, with_entropy=Signal.ENTROPY in needs, with_hidden=Signal.HIDDEN in needs
                )
            )
        log_probs = outputs.pop(0)
        entropy = outputs.pop(0) if Signal.ENTROPY in needs else None
        hidden = outputs.pop(0).float() if Signal.HIDDEN in needs else None
        reference = None
        if Signal.REFERENCE in needs:
            assert trainee.reference is not None
            reference = trainee.reference.log_probs(block)
        if block.is_idle:
            continue
        for index, (row, place) in enumerate(zip(block.rows, block.places, strict=True)):
            here = (block.row == index).to(log_probs.device)
            found[place] = MeasuredRow(
                tokens=block.targets.to(log_probs.device)[here],
                is_policy=torch.from_numpy(row.origins == Origin.POLICY).to(log_probs.device),
                log_probs=log_probs[here],
                reference_log_probs=None if reference is None else reference[here],
                entropy=None if entropy is None else entropy[here],
                hidden=None if hidden is None else hidden[here],
                label=float(labels[place]),
            )
    return [found[place] for place in range(len(found))]


def _output_layer(
    trainee: Trainee, needs: frozenset[Signal]
) -> contextlib.AbstractContextManager[OutputLayer | None]:
    if Signal.HIDDEN in needs:
        return trainee.backend.output_layer()
    return contextlib.nullcontext()


def _answer(
    measure: Measure, rows: Sequence[MeasuredRow], layer: OutputLayer | None
) -> list[Float32]:
    streams: Sequence[Tensor] = measure.fn(rows, layer if Signal.HIDDEN in measure.needs else None)
    shapes = [tuple(stream.shape) for stream in streams]
    expected = [tuple(row.tokens.shape) for row in rows]
    if shapes != expected:
        raise Fatal(
            f'measure "{measure.name}" returned streams of shape {shapes} for rollouts of '
            f"{expected} tokens: it must return one number for each token"
        )
    return [stream.float().cpu().numpy() for stream in streams]
