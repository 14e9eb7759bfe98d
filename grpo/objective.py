"""The learner's half of an algorithm: a frozen record of pure functions over per-token tensors.

loss = sum over tokens of weight * (gates * surrogate + sum of coefficient * penalty). Means are
already in the weights, so packing, micro-batches and ranks cannot change the result. Refuses to
know the model, the optimiser and how rows were packed. Tensors are used through their methods
only: this half, too, can be read and validated without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Signal(StrEnum):
    """What an objective may ask the learner to compute beside the policy's log-probabilities."""

    REFERENCE = "reference"  # log-probs of the frozen reference policy
    ENTROPY = "entropy"  # of the policy at every token, with gradient
    HIDDEN = "hidden"  # last hidden states of the policy, for measures only


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
    origins: Tensor  # [N] of types.Origin
    is_cross_context: Tensor  # [N] bool: sampled after another context, see TrainRow
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
    # Times a function of the penalty's own mean over the update, as a number without gradient.
    scale: Callable[[float], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowScore:
    """One rollout of a whole group under the present weights, in numbers without gradient.

    Sums and means are over the trained tokens (weight other than 0).
    """

    advantage: float  # mean of what the driver sent; an algorithm may send a label or a reward
    log_prob_sum: float
    log_ratio_sum: float  # of the present policy to that at the start of the step
    ratio_mean: float
    num_trained: int


# All rows of one group that have a trained token -> the advantage of each, on all its tokens.
GroupTerm = Callable[[Sequence[RowScore]], Sequence[float]]


class OutputLayer(Protocol):
    """The policy's own output layer, for measures that look beyond the sampled token."""

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32 log-softmax at the sampling temperature; keep n small."""
        ...

    @property
    def chunk_tokens(self) -> int:
        """An n that keeps [n, V] within the learner's memory budget."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRow:
    """One rollout of a whole group, for a measure; no gradient anywhere. T completion tokens."""

    tokens: Tensor  # [T] int64
    is_policy: Tensor  # [T] bool: the policy wrote it
    log_probs: Tensor  # [T] under the present weights
    reference_log_probs: Tensor | None  # [T]
    entropy: Tensor | None  # [T]
    hidden: Tensor | None  # [T, H] float32: what the output layer multiplies to predict each token
    label: float  # NaN: the pipeline gave none


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A [T] stream for each rollout of a group, computed before its batch is built."""

    name: str
    fn: Callable[[Sequence[MeasuredRow], OutputLayer | None], Sequence[Tensor]]  # layer: if HIDDEN
    needs: frozenset[Signal] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnable:
    """A scalar with an optimiser of its own (plain SGD); it weighs the policy term of each row."""

    name: str  # as the metric is called
    initial: float
    learning_rate: float
    weights: Callable[[Tensor, Tensor], Tensor]  # (trained lengths of a group [G], scalar) -> [G]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceUpdate:
    """The reference follows the policy: every so many steps r <- decay * r + (1 - decay) * p."""

    every: int
    decay: float  # 0: a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """From log-probabilities to one number to minimise."""

    log_ratio: LogRatio
    surrogate: SurrogateFn
    gates: tuple[Gate, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    needs: frozenset[Signal] = frozenset()
    measures: tuple[Measure, ...] = ()
    group_term: GroupTerm | None = None
    learnable: Learnable | None = None
    reference_update: ReferenceUpdate | None = None
    stage: Objective | None = None  # of batches with `is_stage`


def loss_and_metrics(objective: Objective, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of these rows, and sums (not means) of what is worth plotting.

    Every metric is a weighted sum with the same coefficients as the loss, so that adding over
    micro-batches and ranks gives the step's mean.
    """
    policy, term = _policy_terms(objective, inputs)
    loss = (inputs.weights * policy).sum()
    metrics = {
        "policy_loss": loss.detach(),
        "clip_ratio/low": (inputs.weights * term.clipped_low).sum(),
        "clip_ratio/high": (inputs.weights * term.clipped_high).sum(),
    }
    for penalty in objective.penalties:
        value = (inputs.weights * penalty.fn(inputs)).sum()
        # The learner puts the scale of the whole update into the coefficient beforehand; where
        # these rows are the whole update this is the same.
        scale = 1.0 if penalty.scale is None else penalty.scale(value.item())
        loss = loss + penalty.coefficient * scale * value
        metrics[penalty.name] = value.detach()
    return loss, metrics


def row_policy_losses(objective: Objective, inputs: LossInputs) -> Tensor:
    """The part of the loss that is the policy term, by row and without gradient. [num_rows]"""
    policy, _ = _policy_terms(objective, inputs)
    losses = (inputs.weights * policy).detach()
    return losses.new_zeros(inputs.num_rows).index_add(0, inputs.row, losses)


def _policy_terms(objective: Objective, inputs: LossInputs) -> tuple[Tensor, Surrogate]:
    """Gates * policy weight * surrogate of every token [N], and the surrogate."""
    term = objective.surrogate(objective.log_ratio(inputs), inputs)
    policy = term.loss * inputs.policy_weights
    for gate in objective.gates:
        policy = policy * gate(inputs).detach()
    return policy, term
