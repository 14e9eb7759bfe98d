"""One step: forward, objective, backward over micro-batches, optimiser, for each update.

Refuses to know which backend holds the policy and which algorithm built the objective.
R rows of an update, N completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo.group_terms import group_advantages, row_scores, with_advantages, with_row_weights
from grpo.objective import (
    GroupTerm,
    LossInputs,
    Objective,
    RowScore,
    Signal,
    loss_and_metrics,
    row_policy_losses,
)
from grpo.scaled_penalties import has_scales, scaled_penalty_sums, with_scales
from grpo.types import StepReport, TrainBatch, TrainRow
from learner.backend import Backend
from learner.config import LearnerConfig
from learner.failures import (
    Cause,
    Slope,
    non_finite_cause,
    raise_for_gradient,
    raise_if_any,
    steepest,
)
from learner.inputs import inputs_of, stream
from learner.measures import Stopwatch, Tally
from learner.packing import Block, blocks
from learner.reference import Reference, WithoutAdapters
from learner.room import room_for, room_for_state
from learner.row_cost import BY_TOKENS, RowCost
from learner.scalar import Scalar


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trainee:
    """What a step works on: the policy, the reference and the loss."""

    backend: Backend
    objective: Objective
    reference: Reference | WithoutAdapters | None  # None: nothing of the objective asks for it
    scalar: Scalar | None = None  # of `objective.learnable`
    config: LearnerConfig
    row_cost: RowCost = BY_TOKENS  # what the ranks share out evenly
    rank: int
    ranks: int

    def blocks(self, rows: Sequence[TrainRow]) -> list[Block]:
        """This rank's micro-batches."""
        return blocks(
            rows,
            max_tokens=self.config.max_tokens_per_microbatch,
            rank=self.rank,
            ranks=self.ranks,
            cost=self.row_cost,
        )

    @contextmanager
    def reference_at_hand(self, needs: Set[Signal]) -> Iterator[None]:
        """The reference where its passes run, if these needs name it."""
        if self.reference is None or Signal.REFERENCE not in needs:
            yield
            return
        with self.room_for_state("copy of the reference to its device"), self.reference.at_hand():
            yield

    def room_for(self, block: Block, phase: str) -> AbstractContextManager[None]:
        """Says which budget to lower if the block's pass does not fit."""
        return room_for(
            block,
            phase,
            max_tokens=self.config.max_tokens_per_microbatch,
            is_checkpointing=self.config.gradient_checkpointing,
        )

    def room_for_state(self, phase: str) -> AbstractContextManager[None]:
        """Says what to change if weights, gradients or optimiser state do not fit."""
        has_second_model = isinstance(self.reference, Reference)
        return room_for_state(phase, self.config, has_second_model=has_second_model)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One optimiser update, this rank's part of it as micro-batches."""

    rows: tuple[TrainRow, ...]  # of all ranks
    blocks: list[Block]
    # [N] each: the policy at the start of the step. None: it is the current one, whose own pass
    # is enough.
    proximal: list[Tensor | None]
    reference: list[Tensor | None]  # [N] each. None: nothing reads it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passed:
    """What the micro-batches of an update leave behind beside their gradient."""

    # [R] the policy loss of this rank's rows before they are weighed, 0 for the others
    row_losses: Tensor
    cause: Cause | None  # what is no number
    slopes: list[Slope]  # to say who is to blame if the gradient is none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowNumbers:
    """What whole groups decide about the rows of an update. None: nothing."""

    advantages: list[float] | None  # [R] of the group term, instead of the driver's
    weights: Tensor | None  # [R] of the learnable scalar, on top of the driver's
    objective: Objective  # the scales of its penalties are in their coefficients


def run_step(trainee: Trainee, batch: TrainBatch, *, learning_rate: float) -> StepReport:
    """Apply every update of the batch; raise NonFinite before the optimiser would spoil it."""
    watch = Stopwatch()
    updates = prepared(trainee, batch.updates, watch)
    tally = Tally(batch.version)
    norms: list[float] = []
    for number, update in enumerate(updates):
        where = f"step {batch.step}, update {number + 1} of {len(updates)}"
        numbers = row_numbers(trainee, update, watch, is_first=number == 0)
        passed = accumulated(trainee, update, numbers, tally, watch)
        raise_if_any(trainee.backend.collect(passed.cause), where)
        # Without a token that counts there is no gradient, and the optimiser's momentum of earlier
        # updates must not move the policy (an algorithm that trains in its stage alone).
        is_counted = any(row.weights.any() for row in update.rows)
        # Adam's state is made in the first step.
        with watch.measure("optimizer"), trainee.room_for_state("optimiser step"):
            norms.append(trainee.backend.step(learning_rate if is_counted else 0.0))
        if not np.isfinite(norms[-1]):
            found = trainee.backend.collect(steepest(passed.slopes))
            raise_for_gradient(found, norms[-1], where)
        if trainee.scalar is not None:
            trainee.scalar.learn(update.rows, trainee.backend.sum_over_ranks(passed.row_losses))
    with watch.measure("reduce"):
        measured = tally.metrics(trainee.backend, num_updates=len(updates))
    if trainee.scalar is not None:
        measured[trainee.scalar.name] = trainee.scalar.value
    metrics = {
        **measured,
        "grad_norm": sum(norms) / len(norms),
        "learning_rate": learning_rate,
        "num_tokens": float(sum(row.num_tokens for update in batch.updates for row in update)),
    }
    return StepReport(metrics=metrics, timings_s=dict(watch.seconds))


def prepared(
    trainee: Trainee, updates: Sequence[tuple[TrainRow, ...]], watch: Stopwatch
) -> list[Update]:
    """Every update in micro-batches, with the reference and the policy at the start of the step.

    Rows that come again in a later update (another epoch) are packed and computed once.
    """
    plan = [tuple(id(row) for row in rows) for rows in updates]
    unique = dict(zip(plan, updates, strict=True))
    with watch.measure("pack"):
        parts = {key: trainee.blocks(rows) for key, rows in unique.items()}
    with watch.measure("proximal"):
        proximal = {
            key: [None if len(updates) == 1 else log_probs_of(trainee, b) for b in blocks_of]
            for key, blocks_of in parts.items()
        }
    with watch.measure("reference"), trainee.reference_at_hand(trainee.objective.needs):
        reference = {
            key: [reference_log_probs(trainee, b, unique[key]) for b in blocks_of]
            for key, blocks_of in parts.items()
        }
    found = {
        key: Update(rows=rows, blocks=parts[key], proximal=proximal[key], reference=reference[key])
        for key, rows in unique.items()
    }
    return [found[key] for key in plan]


def row_numbers(
    trainee: Trainee, update: Update, watch: Stopwatch, *, is_first: bool
) -> RowNumbers:
    """What group term, scales of penalties and learnable scalar say of this update's rows."""
    objective, scalar = trainee.objective, trainee.scalar
    advantages: list[float] | None = None
    if objective.group_term is not None or has_scales(objective):
        with watch.measure("group_term"):
            present = present_inputs(trainee, update, is_first=is_first)
            if objective.group_term is not None:
                advantages = new_advantages(trainee, objective.group_term, update, present)
            sums = [scaled_penalty_sums(objective, inputs) for _, inputs in present]
            parts = trainee.backend.collect(sums)
            objective = with_scales(objective, [part for rank in parts for part in rank])
    weights = None if scalar is None else scalar.row_weights(update.rows)
    return RowNumbers(advantages=advantages, weights=weights, objective=objective)


def present_inputs(
    trainee: Trainee, update: Update, *, is_first: bool
) -> list[tuple[Block, LossInputs]]:
    """This rank's rows under the present policy, without gradient; a pass over all of them."""
    found = []
    parts = zip(update.blocks, update.proximal, update.reference, strict=True)
    for block, proximal, reference in parts:
        # Before the first update the policy still is the one at the start of the step.
        is_known = is_first and proximal is not None
        log_probs = proximal if is_known else log_probs_of(trainee, block)
        assert log_probs is not None
        if not block.is_idle:
            # Of the loss's signals, a scaled penalty may read the reference.
            inputs = inputs_of(block, log_probs, proximal=proximal, reference=reference)
            found.append((block, inputs))
    return found


def new_advantages(
    trainee: Trainee,
    term: GroupTerm,
    update: Update,
    present: Sequence[tuple[Block, LossInputs]],
) -> list[float]:
    """The advantage of each row [R] by the group term."""
    mine: dict[int, RowScore] = {}
    for block, inputs in present:
        mine |= dict(zip(block.places, row_scores(inputs), strict=True))
    found = {k: score for part in trainee.backend.collect(mine) for k, score in part.items()}
    scores = [found[place] for place in range(len(update.rows))]
    return group_advantages(term, [row.group for row in update.rows], scores)


def accumulated(
    trainee: Trainee, update: Update, numbers: RowNumbers, tally: Tally, watch: Stopwatch
) -> Passed:
    """Run all micro-batches backward."""
    row_losses = torch.zeros(len(update.rows), dtype=torch.float64, device=trainee.backend.device)
    cause: Cause | None = None
    slopes: list[Slope] = []
    parts = zip(update.blocks, update.proximal, update.reference, strict=True)
    for number, (block, proximal, reference) in enumerate(parts):
        fits = trainee.room_for(block, "forward and backward pass")
        with watch.measure("forward_backward"), fits:
            inputs = loss_inputs(trainee, block, proximal, reference)
            note_slope(inputs, block, slopes)
            if numbers.advantages is not None:
                inputs = with_advantages(inputs, [numbers.advantages[i] for i in block.places])
            if numbers.weights is not None:
                if not block.is_idle:
                    losses = row_policy_losses(numbers.objective, inputs)
                    row_losses[list(block.places)] = losses.double()
                inputs = with_row_weights(inputs, numbers.weights[list(block.places)])
            loss, terms = loss_and_metrics(numbers.objective, inputs)
            if cause is None and not torch.isfinite(loss):
                cause = non_finite_cause(inputs, block.rows, loss.item())
            # Even a hopeless micro-batch takes part: the other ranks wait for it.
            trainee.backend.backward(loss, is_last=number == len(update.blocks) - 1)
            tally.add(inputs, block.rows, {"loss": loss, **terms})
    return Passed(row_losses=row_losses, cause=cause, slopes=slopes)


def note_slope(inputs: LossInputs, block: Block, slopes: list[Slope]) -> None:
    """Have the backward pass append the gradient by the block's log-probabilities."""
    inputs.log_probs.register_hook(
        lambda gradient: slopes.append(Slope(block=block, values=gradient.detach()))
    )


@torch.no_grad()
def log_probs_of(trainee: Trainee, block: Block) -> Tensor:
    """[N] of the block's completion tokens, without gradient."""
    with trainee.room_for(block, "pass without gradient"):
        return trainee.backend.forward(block)[0]


def reference_log_probs(trainee: Trainee, block: Block, rows: Sequence[TrainRow]) -> Tensor | None:
    """[N] of the reference, if the objective asks for it; no pass where the rows bring them.

    `rows` are those of the whole update, so that all ranks run a pass or none does: under ZeRO-3
    they gather the parameters for it together.
    """
    if Signal.REFERENCE not in trainee.objective.needs:
        return None
    if all(row.reference_log_probs is not None for row in rows):
        known = [row.reference_log_probs for row in block.rows]
        return stream([values for values in known if values is not None], trainee.backend.device)
    assert trainee.reference is not None
    with trainee.room_for(block, "reference model's pass"):
        return trainee.reference.log_probs(block)


def loss_inputs(
    trainee: Trainee, block: Block, proximal: Tensor | None, reference: Tensor | None
) -> LossInputs:
    """Run the policy over a block and put every per-token stream beside its log-probabilities."""
    with_entropy = Signal.ENTROPY in trainee.objective.needs
    outputs = trainee.backend.forward(block, with_entropy=with_entropy)
    entropy = outputs[1] if with_entropy else None
    return inputs_of(block, outputs[0], proximal=proximal, reference=reference, entropy=entropy)
