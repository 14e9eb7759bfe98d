"""What the learner asks of whatever holds the policy and its optimiser.

Two implementations: torch_backend (one rank) and deepspeed_backend. Refuses to know rows, losses
and algorithms. Every method is called on all ranks, in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from learner.packing import Block

T = TypeVar("T")


class Backend(Protocol):
    """The policy on one device, or one rank's part of it."""

    device: torch.device

    def forward(self, block: Block, *, with_entropy: bool) -> tuple[Tensor, ...]:
        """Log-probabilities [N] of the block's completion tokens and, if asked for, entropy [N]."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the update's; `is_last`: the update is complete."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, apply the update and forget its gradient; the norm before clipping.

        A norm that is not finite (the same on every rank) leaves the weights untouched.
        """
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """[K] sums over the ranks, on every rank."""
        ...

    def collect(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""
        ...

    def gather(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights on CPU, tied ones once, on rank 0; empty elsewhere."""
        ...

    def save(self, folder: Path, *, steps_done: int) -> None:
        """Write weights, master weights and optimiser state."""
        ...

    def load(self, folder: Path) -> int:
        """Read what `save` wrote; the steps done."""
        ...

    def close(self) -> None:
        """Leave the process group, if there is one."""
        ...
