"""What stopped a step: which number of which token is none.

Words only: refuses to know the backend and what the driver makes of the error. N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.errors import NonFinite
from grpo.objective import LossInputs
from grpo.types import TrainRow
from learner.packing import Block

ENGINE, POLICY, ENTROPY = (
    "log-probability of the rollout engine",
    "log-probability of the policy",
    "entropy",
)
# What a policy gives whose weights are useless, whoever computes it.
OF_THE_WEIGHTS = (ENGINE, POLICY, ENTROPY)
SPOILT_WEIGHTS = (
    "an update before this one may have made the weights useless: lower learner.learning_rate and "
    "resume from a checkpoint before it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What spoilt a loss or a gradient."""

    text: str
    place: tuple[int, int, int] | None = None  # group, rollout, completion token; None: unknown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slope:
    """The gradient of the loss of one micro-batch by the log-probabilities of its tokens."""

    block: Block
    values: Tensor  # [N]


def non_finite_cause(inputs: LossInputs, rows: Sequence[TrainRow], loss: float) -> Cause:
    """Which number of which token spoilt the loss, as far as it can be told."""
    proximal = inputs.proximal_log_probs
    streams = {
        "weight": inputs.weights,
        "advantage": inputs.advantages,
        "policy weight": inputs.policy_weights,
        ENGINE: inputs.behaviour_log_probs,
        "log-probability of the reference": inputs.reference_log_probs,
        POLICY: inputs.log_probs,
        ENTROPY: inputs.entropy,
        "ratio to the policy that sampled": (proximal - inputs.behaviour_log_probs).exp(),
        "ratio to the policy at the start of the step": (inputs.log_probs - proximal).exp(),
    }
    for name, values in streams.items():
        bad = [] if values is None else (~torch.isfinite(values)).nonzero().flatten().tolist()
        if values is not None and bad:
            place = _place(inputs.row, rows, bad[0])
            blamed = f"; {SPOILT_WEIGHTS}" if name in OF_THE_WEIGHTS else ""
            return Cause(
                text=f"the {name} is {values[bad[0]].item()} at {_words(place)} (and of "
                f"{len(bad) - 1} more tokens of its micro-batch), so the loss is {loss}{blamed}",
                place=place,
            )
    groups = sorted({row.group for row in rows})
    return Cause(text=f"the loss of groups {groups} is {loss} although every input is finite")


def steepest(slopes: Sequence[Slope]) -> tuple[float, Cause] | None:
    """The token whose log-probability moves the loss most, NaN and infinity before all numbers.

    None: this rank has no token with a slope.
    """
    found: tuple[float, Cause] | None = None
    for slope in slopes:
        sizes = slope.values.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        token = int(sizes.argmax())
        size = float(sizes[token])
        if slope.block.is_idle or (found is not None and size <= found[0]):
            continue
        place = _place(slope.block.row, slope.block.rows, token)
        text = f"the loss is steepest in the log-probability of {_words(place)}"
        found = size, Cause(text=text, place=place)
    return found


def raise_if_any(causes: Sequence[Cause | None], where: str) -> None:
    """The same exception on every rank, whichever rank saw the number."""
    found = next((cause for cause in causes if cause is not None), None)
    if found is not None:
        error = NonFinite(f"{where}: {found.text}; the optimiser has not moved")
        error.place = found.place
        raise error


def raise_for_gradient(
    slopes: Sequence[tuple[float, Cause] | None], norm: float, what: str
) -> None:
    """Every loss is finite and the gradient is not; `slopes` are the steepest of each rank."""
    known = [slope for slope in slopes if slope is not None]
    cause = max(known, key=lambda slope: slope[0])[1] if known else None
    detail = "" if cause is None else f"; {cause.text}"
    error = NonFinite(
        f"{what}: every loss is finite, but the gradient norm is {norm}{detail}; the optimiser has "
        "not moved. Lower learning_rate, or resume from an older checkpoint"
    )
    error.place = None if cause is None else cause.place
    raise error


def _place(row_of: Tensor, rows: Sequence[TrainRow], token: int) -> tuple[int, int, int]:
    """Group, rollout and completion token of token `token` of a micro-batch."""
    index = int(row_of[token])
    return rows[index].group, rows[index].index, int((row_of[:token] == index).sum())


def _words(place: tuple[int, int, int]) -> str:
    group, rollout, token = place
    return f"completion token {token} of rollout {rollout} of group {group}"
