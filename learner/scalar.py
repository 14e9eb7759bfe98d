"""The learnable scalar of an objective: its value and its own plain SGD.

Neither clipped nor decayed, and apart from the policy's optimiser. Refuses to know rows' tokens.
The value is the same on all ranks, because the losses it learns from are summed over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.group_terms import learnable_weights, learned_value
from grpo.objective import Learnable
from grpo.types import TrainRow


class Scalar:
    """Holds the value between updates."""

    def __init__(self, learnable: Learnable) -> None:
        self._learnable = learnable
        self.value = learnable.initial

    @property
    def name(self) -> str:
        return self._learnable.name

    def row_weights(self, rows: Sequence[TrainRow]) -> Tensor:
        """The weight of each row. [R]"""
        return self._weights(self._leaf(), rows).detach()

    def learn(self, rows: Sequence[TrainRow], row_losses: Tensor) -> None:
        """One step of SGD; `row_losses` [R] at weight 1, of the whole update over all ranks."""
        leaf = self._leaf()
        weights = self._weights(leaf, rows)
        self.value = learned_value(self._learnable, leaf, weights, row_losses.to(weights))

    def _leaf(self) -> Tensor:
        return torch.tensor(self.value, dtype=torch.float64, requires_grad=True)

    def _weights(self, leaf: Tensor, rows: Sequence[TrainRow]) -> Tensor:
        lengths = [int(np.count_nonzero(row.weights)) for row in rows]
        return learnable_weights(self._learnable, leaf, [row.group for row in rows], lengths)
