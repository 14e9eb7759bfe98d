"""The learner's half of an algorithm: a frozen record of pure functions over per-token tensors.

loss = sum over tokens of weight * (gates * surrogate + sum of coefficient * penalty). Means are
already in the weights, so packing, micro-batches and ranks cannot change the result. Refuses to
know the model, the optimiser and how rows were packed. Tensors are used through their methods
only: this half, too, can be read and validated without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Signal(StrEnum):
    """What an objective may ask the learner to compute beside the policy's log-probabilities."""

    REFERENCE = "reference"  # log-probs of the frozen reference policy
    ENTROPY = "entropy"  # of the policy at every token, with gradient


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """The trained and untrained completion tokens of some whole rows, concatenated. N tokens."""

    log_probs: Tensor  # [N] current policy, with gradient
    proximal_log_probs: Tensor  # [N] policy at the start of the step, no gradient
    # [N] policy that sampled, as the engine reported it; the proximal one on guidance tokens,
    # which nobody sampled: their importance weight is 1.
    behaviour_log_probs: Tensor
    reference_log_probs: Tensor | None  # [N]
    entropy: Tensor | None  # [N]
    advantages: Tensor  # [N]
    weights: Tensor  # [N] 0: not trained
    policy_weights: Tensor  # [N]
    row: Tensor  # [N] int64, which row a token belongs to, 0..num_rows-1
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surrogate:
    """The policy term per token and where clipping held it back."""

    loss: Tensor  # [N]
    clipped_low: Tensor  # [N] bool
    clipped_high: Tensor  # [N] bool


LogRatio = Callable[[LossInputs], "Tensor"]
SurrogateFn = Callable[["Tensor", LossInputs], Surrogate]
Gate = Callable[[LossInputs], "Tensor"]
PenaltyFn = Callable[[LossInputs], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """A term added to the loss of every trained token."""

    name: str  # as the metric is called
    coefficient: float
    fn: PenaltyFn


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """From log-probabilities to one number to minimise."""

    log_ratio: LogRatio
    surrogate: SurrogateFn
    gates: tuple[Gate, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    needs: frozenset[Signal] = frozenset()


def loss_and_metrics(objective: Objective, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of these rows, and sums (not means) of what is worth plotting.

    Every metric is a weighted sum with the same coefficients as the loss, so that adding over
    micro-batches and ranks gives the step's mean.
    """
    log_ratio = objective.log_ratio(inputs)
    term = objective.surrogate(log_ratio, inputs)
    policy = term.loss * inputs.policy_weights
    for gate in objective.gates:
        policy = policy * gate(inputs).detach()
    loss = (inputs.weights * policy).sum()
    metrics = {
        "policy_loss": loss.detach(),
        "clip_ratio/low": (inputs.weights * term.clipped_low).sum(),
        "clip_ratio/high": (inputs.weights * term.clipped_high).sum(),
    }
    for penalty in objective.penalties:
        value = (inputs.weights * penalty.fn(inputs)).sum()
        loss = loss + penalty.coefficient * value
        metrics[penalty.name] = value.detach()
    return loss, metrics
