"""Sums over the trained tokens of each row, handed back to every token of the row. N tokens.

Rows are whole in `LossInputs`, so how they were packed cannot change a result. Tensors are used
through their methods only: no torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import LossInputs


def trained_tokens(inputs: LossInputs) -> Tensor:
    """Which tokens the loss weighs. [N] bool"""
    return inputs.weights != 0


def row_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """The sum over the trained tokens of the row that a token belongs to. [N]"""
    counted = values.masked_fill(~trained_tokens(inputs), 0.0)
    return values.new_zeros(inputs.num_rows).index_add(0, inputs.row, counted)[inputs.row]


def row_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """The mean over the trained tokens of the row that a token belongs to; 0 without any. [N]"""
    ones = values.detach().new_ones(values.shape)
    return row_sum(values, inputs) / row_sum(ones, inputs).clamp(min=1.0)
