"""The learner's half of an explanation: loss, its parts and its gradient, token by token.

Runs an objective in double precision on log-probs that are given, not computed. Refuses to know
groups, files and the screen. T tokens of a row, N tokens and R rows of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.group_terms import (
    learnable_weights,
    learned_value,
    replaced_advantages,
    with_row_weights,
)
from grpo.objective import (
    Learnable,
    LossInputs,
    Measure,
    MeasuredRow,
    Objective,
    Signal,
    loss_and_metrics,
    row_policy_losses,
)
from grpo.types import Bool, Float64, Int32, Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streams:
    """What a file says of the tokens of one rollout; each [T]."""

    tokens: Int32
    origins: np.ndarray[tuple[int], np.dtype[np.uint8]]
    behaviour: Float64
    proximal: Float64
    current: Float64
    reference: Float64
    entropy: Float64 | None
    hidden: Float64 | None  # [T, H]
    is_cross_context: bool

    def first(self, size: int) -> Streams:
        """Of the first tokens alone."""
        entropy, hidden = self.entropy, self.hidden
        return Streams(
            tokens=self.tokens[:size],
            origins=self.origins[:size],
            behaviour=self.behaviour[:size],
            proximal=self.proximal[:size],
            current=self.current[:size],
            reference=self.reference[:size],
            entropy=None if entropy is None else entropy[:size],
            hidden=None if hidden is None else hidden[:size],
            is_cross_context=self.is_cross_context,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowInput:
    """One rollout of an update: its streams, and what the driver made of it, each [T]."""

    group: int
    streams: Streams
    advantages: Float64
    weights: Float64
    policy_weights: Float64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowNumbers:
    """What the objective made of one rollout, each [T]."""

    advantages: Float64  # those of the group term where there is one
    policy_weights: Float64  # with the learnable scalar's where there is one
    log_ratios: Float64
    surrogate: Float64  # before gates and weights
    gates: Float64  # multiplied together
    clipped_low: Bool
    clipped_high: Bool
    penalties: Mapping[str, Float64]  # before their coefficients
    loss: Float64  # what the token adds to the loss
    gradient: Float64  # of the loss, with respect to the current log-probs
    entropy_gradient: Float64 | None  # of the loss, with respect to the entropy; None: not read


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UpdateNumbers:
    """One optimiser update."""

    loss: float
    metrics: Mapping[str, float]
    rows: list[RowNumbers]
    learnable: float | None  # its value after the update


def update_numbers(
    objective: Objective, rows: Sequence[RowInput], learnable: float | None
) -> UpdateNumbers:
    """The update that the learner would compute from these rows."""
    inputs = _inputs(objective, rows)
    groups = [row.group for row in rows]
    if objective.group_term is not None:
        inputs = replaced_advantages(objective.group_term, inputs, groups)
    if objective.learnable is not None:
        assert learnable is not None
        inputs, learnable = _weighed(objective, objective.learnable, inputs, groups, learnable)
    loss, metrics = loss_and_metrics(objective, inputs)
    per_weight, gradient, entropy_gradient = _gradients(loss, inputs)
    # The loss is linear in the weights, so this is what each token adds to it.
    parts = _parts(objective, inputs) | {"loss": (inputs.weights * per_weight).detach()}
    gap = abs(parts["loss"].sum().item() - loss.item())
    assert not gap > 1e-9 * max(1.0, abs(loss.item())), f"the tokens miss the loss by {gap}"
    sizes = [len(row.weights) for row in rows]
    columns = {name: _split(values, sizes) for name, values in parts.items()}
    names = [penalty.name for penalty in objective.penalties]
    return UpdateNumbers(
        loss=loss.item(),
        metrics={"loss": loss.item()} | {name: value.item() for name, value in metrics.items()},
        rows=[
            RowNumbers(
                advantages=columns["advantages"][i],
                policy_weights=columns["policy_weights"][i],
                log_ratios=columns["log_ratios"][i],
                surrogate=columns["surrogate"][i],
                gates=columns["gates"][i],
                clipped_low=columns["clipped_low"][i] != 0,
                clipped_high=columns["clipped_high"][i] != 0,
                penalties={name: columns[f"penalty {name}"][i] for name in names},
                loss=columns["loss"][i],
                gradient=_split(gradient, sizes)[i],
                entropy_gradient=None
                if entropy_gradient is None
                else _split(entropy_gradient, sizes)[i],
            )
            for i in range(len(rows))
        ],
        learnable=learnable,
    )


def measured(
    measure: Measure, rows: Sequence[Streams], labels: Float64, output_layer: Float64 | None
) -> list[Float64]:
    """[T] for each rollout of a whole group, as the learner would measure it."""
    _require(measure, rows, output_layer)
    asked = [
        MeasuredRow(
            tokens=torch.tensor(row.tokens).long(),
            is_policy=torch.tensor(row.origins == Origin.POLICY),
            log_probs=torch.tensor(row.proximal),
            reference_log_probs=_if(Signal.REFERENCE in measure.needs, row.reference),
            entropy=_if(Signal.ENTROPY in measure.needs, row.entropy),
            hidden=_if(Signal.HIDDEN in measure.needs, row.hidden),
            label=float(label),
        )
        for row, label in zip(rows, labels, strict=True)
    ]
    layer = None if output_layer is None else GivenOutputLayer(torch.tensor(output_layer))
    with torch.no_grad():
        streams = measure.fn(asked, layer if Signal.HIDDEN in measure.needs else None)
    return [stream.double().numpy() for stream in streams]


@dataclass(frozen=True, slots=True, eq=False)
class GivenOutputLayer:
    """An output layer without bias, as a file gives it; temperature 1."""

    weight: Tensor  # [V, H]
    chunk_tokens: int = field(default=1024)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]"""
        return (hidden.to(self.weight) @ self.weight.T).log_softmax(-1)


def _require(measure: Measure, rows: Sequence[Streams], output_layer: Float64 | None) -> None:
    given = {
        Signal.ENTROPY: all(row.entropy is not None for row in rows),
        Signal.HIDDEN: all(row.hidden is not None for row in rows) and output_layer is not None,
        Signal.REFERENCE: True,
    }
    what = {Signal.ENTROPY: "entropy", Signal.HIDDEN: "hidden, and output_layer for the batch"}
    for signal in sorted(measure.needs):
        if not given[signal]:
            raise UserError(
                f"the algorithm measures {measure.name!r} from what the file does not have: give "
                f"every rollout {what[signal]}, or the stream itself as measured.{measure.name}"
            )


def _inputs(objective: Objective, rows: Sequence[RowInput]) -> LossInputs:
    streams = [row.streams for row in rows]
    sizes = torch.tensor([len(row.weights) for row in rows])
    proximal = _joined([of_row.proximal for of_row in streams])
    origins = _joined([of_row.origins for of_row in streams])
    crosses = [np.full(len(s.tokens), s.is_cross_context) for s in streams]
    wants = objective.needs
    if Signal.ENTROPY in wants and any(of_row.entropy is None for of_row in streams):
        raise UserError("the algorithm reads the policy's entropy: give every rollout entropy")
    entropy = [of_row.entropy for of_row in streams if of_row.entropy is not None]
    return LossInputs(
        log_probs=_joined([of_row.current for of_row in streams]).requires_grad_(),
        proximal_log_probs=proximal,
        # As in the learner: nobody sampled a guidance token.
        behaviour_log_probs=torch.where(
            origins == Origin.GUIDANCE, proximal, _joined([s.behaviour for s in streams])
        ),
        reference_log_probs=_joined([of_row.reference for of_row in streams])
        if Signal.REFERENCE in wants
        else None,
        entropy=_joined(entropy).requires_grad_() if Signal.ENTROPY in wants else None,
        advantages=_joined([row.advantages for row in rows]),
        weights=_joined([row.weights for row in rows]).requires_grad_(),
        policy_weights=_joined([row.policy_weights for row in rows]),
        origins=origins,
        is_cross_context=_joined(crosses),
        row=torch.repeat_interleave(torch.arange(len(rows)), sizes),
        num_rows=len(rows),
    )


def _weighed(
    objective: Objective,
    learnable: Learnable,
    inputs: LossInputs,
    groups: Sequence[int],
    value: float,
) -> tuple[LossInputs, float]:
    """The inputs with the rows' weights, and the scalar after the update."""
    trained = (inputs.weights != 0).long()
    lengths = trained.new_zeros(inputs.num_rows).index_add(0, inputs.row, trained).tolist()
    leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    weights = learnable_weights(learnable, leaf, groups, lengths)
    after = learned_value(learnable, leaf, weights, row_policy_losses(objective, inputs))
    return with_row_weights(inputs, weights), after


def _parts(objective: Objective, inputs: LossInputs) -> dict[str, Tensor]:
    """What stands at the points of the objective, before it is multiplied and summed; each [N]."""
    log_ratios = objective.log_ratio(inputs)
    term = objective.surrogate(log_ratios, inputs)
    gates = torch.ones_like(term.loss)
    for gate in objective.gates:
        gates = gates * gate(inputs)
    parts = {
        "advantages": inputs.advantages,
        "policy_weights": inputs.policy_weights,
        "log_ratios": log_ratios,
        "surrogate": term.loss,
        "gates": gates,
        "clipped_low": term.clipped_low,
        "clipped_high": term.clipped_high,
        **{f"penalty {penalty.name}": penalty.fn(inputs) for penalty in objective.penalties},
    }
    return {name: value.detach().double() for name, value in parts.items()}


def _gradients(loss: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """With respect to the weights, to the log-probs, and to the entropy if anything reads it."""
    wanted = [inputs.weights, inputs.log_probs]
    wanted += [] if inputs.entropy is None else [inputs.entropy]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    zeros = torch.zeros_like(inputs.log_probs)
    gradients = [zeros if one is None else one for one in found]
    return gradients[0], gradients[1], gradients[2] if len(gradients) > 2 else None


def _split(values: Tensor, sizes: Sequence[int]) -> list[Float64]:
    return np.split(values.numpy(), np.cumsum(sizes)[:-1])


def _joined(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor(np.concatenate(arrays))


def _if(wanted: bool, values: Float64 | None) -> Tensor | None:
    return torch.tensor(values) if wanted and values is not None else None
