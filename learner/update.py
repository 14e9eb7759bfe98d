"""One step: forward, objective, backward over micro-batches, optimiser, for each update.

Refuses to know which backend holds the policy and which algorithm built the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo.errors import NonFinite
from grpo.objective import LossInputs, Objective, Signal, loss_and_metrics
from grpo.types import Origin, StepReport, TrainBatch, TrainRow
from learner.backend import Backend
from learner.measures import Stopwatch, add, agreement, agreement_sums
from learner.packing import Block, blocks
from learner.policy import Policy, policy_inputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trainee:
    """What a step works on: the policy, the frozen reference and the loss."""

    backend: Backend
    objective: Objective
    reference: Policy | None  # None: the objective does not ask for it
    max_tokens: int  # of one micro-batch
    rank: int
    ranks: int

    def blocks(self, rows: Sequence[TrainRow]) -> list[Block]:
        """This rank's micro-batches."""
        return blocks(rows, max_tokens=self.max_tokens, rank=self.rank, ranks=self.ranks)


def run_step(trainee: Trainee, batch: TrainBatch, *, learning_rate: float) -> StepReport:
    """Apply every update of the batch; raise NonFinite before the optimiser would spoil it."""
    watch = Stopwatch()
    with watch.measure("pack"):
        plan = [trainee.blocks(update) for update in batch.updates]
    with watch.measure("proximal"):
        proximal = proximal_log_probs(trainee, plan)
    sums: dict[str, Tensor] = {}
    largest_gap = 0.0
    norms: list[float] = []
    for number, update in enumerate(plan):
        where = f"step {batch.step}, update {number + 1} of {len(plan)}"
        cause: str | None = None
        for place, block in enumerate(update):
            with watch.measure("reference"):
                reference = reference_log_probs(trainee, block)
            with watch.measure("forward_backward"):
                inputs = loss_inputs(trainee, block, proximal[number][place], reference)
                loss, terms = loss_and_metrics(trainee.objective, inputs)
                if cause is None and not torch.isfinite(loss):
                    cause = non_finite_cause(inputs, block.rows, loss.item())
                # Even a hopeless micro-batch takes part: the other ranks wait for it.
                trainee.backend.backward(loss, is_last=place == len(update) - 1)
                gaps, gap = agreement_sums(inputs, block.rows, batch.version)
                add(sums, {"loss": loss, **terms, **gaps})
                largest_gap = max(largest_gap, gap)
        raise_if_any(trainee.backend.collect(cause), where)
        with watch.measure("optimizer"):
            norms.append(trainee.backend.step(learning_rate))
        if not np.isfinite(norms[-1]):
            raise NonFinite(
                f"{where}: every loss is finite, but the gradient norm is {norms[-1]}; the "
                "optimiser has not moved. Lower learning_rate, or resume from an older checkpoint"
            )
    with watch.measure("reduce"):
        totals = reduced(trainee.backend, sums)
        largest_gap = max(trainee.backend.collect(largest_gap))
    metrics = {
        **{name: totals[name] / len(plan) for name in ("loss", *terms)},
        "grad_norm": sum(norms) / len(norms),
        "learning_rate": learning_rate,
        "num_tokens": float(sum(row.num_tokens for update in batch.updates for row in update)),
        **agreement(totals, largest_gap),
    }
    return StepReport(metrics=metrics, timings_s=dict(watch.seconds))


def proximal_log_probs(trainee: Trainee, plan: list[list[Block]]) -> list[list[Tensor | None]]:
    """The policy at the start of the step, by update and micro-batch.

    None where a single update makes it the current policy, whose own pass is enough.
    """
    if len(plan) == 1:
        return [[None] * len(plan[0])]
    return [[log_probs_of(trainee.backend, block) for block in update] for update in plan]


@torch.no_grad()
def log_probs_of(backend: Backend, block: Block) -> Tensor:
    """[N] of the block's completion tokens, without gradient."""
    return backend.forward(block, with_entropy=False)[0]


@torch.no_grad()
def reference_log_probs(trainee: Trainee, block: Block) -> Tensor | None:
    """[N] of the frozen reference, if the objective asks for it."""
    if trainee.reference is None:
        return None
    log_probs: Tensor = trainee.reference(**policy_inputs(block, trainee.backend.device))[0]
    return log_probs


def loss_inputs(
    trainee: Trainee, block: Block, proximal: Tensor | None, reference: Tensor | None
) -> LossInputs:
    """Run the policy over a block and put every per-token stream beside its log-probabilities."""
    with_entropy = Signal.ENTROPY in trainee.objective.needs
    outputs = trainee.backend.forward(block, with_entropy=with_entropy)
    device = outputs[0].device

    def stream(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    proximal = outputs[0].detach() if proximal is None else proximal
    origins = stream([row.origins for row in block.rows])
    crosses = [np.full(len(row.tokens), row.is_cross_context) for row in block.rows]
    behaviour = stream([row.behaviour_log_probs for row in block.rows])
    return LossInputs(
        log_probs=outputs[0],
        proximal_log_probs=proximal,
        # Nobody sampled a guidance token: its importance is 1 by definition.
        behaviour_log_probs=torch.where(origins == Origin.GUIDANCE, proximal, behaviour),
        reference_log_probs=reference,
        entropy=outputs[1] if with_entropy else None,
        advantages=stream([row.advantages for row in block.rows]),
        weights=stream([row.weights for row in block.rows]),
        policy_weights=stream([row.policy_weights for row in block.rows]),
        origins=origins,
        is_cross_context=stream(crosses),
        row=block.row.to(device),
        num_rows=len(block.rows),
    )


def non_finite_cause(inputs: LossInputs, rows: Sequence[TrainRow], loss: float) -> str:
    """Which number of which token spoilt the loss, as far as it can be told."""
    streams = {
        "weight": inputs.weights,
        "advantage": inputs.advantages,
        "policy weight": inputs.policy_weights,
        "log-probability of the rollout engine": inputs.behaviour_log_probs,
        "log-probability of the reference": inputs.reference_log_probs,
        "log-probability of the policy": inputs.log_probs,
        "entropy": inputs.entropy,
    }
    for name, values in streams.items():
        bad = [] if values is None else (~torch.isfinite(values)).nonzero().flatten().tolist()
        if values is not None and bad:
            row = int(inputs.row[bad[0]])
            token = int((inputs.row[: bad[0]] == row).sum())
            return (
                f"the {name} is {values[bad[0]].item()} at completion token {token} of rollout "
                f"{rows[row].index} of group {rows[row].group} (and of {len(bad) - 1} more tokens "
                f"of its micro-batch), so the loss is {loss}"
            )
    groups = sorted({row.group for row in rows})
    return f"the loss of groups {groups} is {loss} although every input is finite"


def raise_if_any(causes: list[str | None], where: str) -> None:
    """The same exception on every rank, whichever rank saw the number."""
    found = [cause for cause in causes if cause is not None]
    if found:
        raise NonFinite(f"{where}: {found[0]}; the optimiser has not moved")


def reduced(backend: Backend, sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums over all ranks. Every rank has the same names: each ran a micro-batch."""
    total = backend.sum_over_ranks(torch.stack(list(sums.values())))
    return dict(zip(sums, total.tolist(), strict=True))
