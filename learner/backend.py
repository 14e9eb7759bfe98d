"""What the learner asks of whatever holds the policy and its optimiser.

Two implementations: torch_backend (one rank) and deepspeed_backend. Refuses to know rows, losses
and algorithms. Every method is called on all ranks, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from grpo.objective import OutputLayer
from learner.packing import Block

T = TypeVar("T")


class Backend(Protocol):
    """The policy on one device, or one rank's part of it."""

    device: torch.device

    def forward(
        self, block: Block, *, with_entropy: bool = False, with_hidden: bool = False
    ) -> tuple[Tensor, ...]:
        """Log-probabilities [N] of the block's completion tokens, entropy [N], hidden [N, H]."""
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
        """[K] sums over the ranks, on every rank; those of a sequence group count as one."""
        ...

    def collect(self, value: T) -> list[T]:
        """The value of each rank, on every rank; those of a sequence group count as one."""
        ...

    def output_layer(self) -> AbstractContextManager[OutputLayer]:
        """The policy's output layer, usable on every rank by itself until the context ends."""
        ...

    def whole_weights(self) -> Iterator[Mapping[str, Tensor]]:
        """All weights by name, some at a time, on every rank; each part until the next one."""
        ...

    def whole_adapters(self) -> Iterator[Mapping[str, Tensor]]:
        """Every A and B by name, in one part, on every rank; until the next part is asked for."""
        ...

    def copied_state(self) -> dict[str, Tensor]:
        """This rank's pieces of master weights and optimiser state (learner/shards.py), on CPU."""
        ...

    def restore(self, files: Sequence[Path]) -> None:
        """Go on from the pieces in these files, which may be those of other ranks or backends."""
        ...

    def close(self) -> None:
        """Leave the process group, if there is one."""
        ...
