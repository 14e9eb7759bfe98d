"""Output layers and measured rows for measures that look at whole distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo.objective import MeasuredRow

# Added to hidden states so that no two rows of a table are equal; far below any tolerance.
TAG = 1e-12


@dataclass
class TabledLayer:
    """Gives each hidden state the distribution that it was written down with."""

    chunk_tokens: int = 100
    table: dict[tuple[float, ...], list[float]] = field(default_factory=dict)

    def row(
        self,
        tokens: Sequence[int],
        probabilities: Sequence[Sequence[float]],
        hidden: Sequence[Sequence[float]] | None = None,
        *,
        label: float = float("nan"),
        guidance: int = 0,
    ) -> MeasuredRow:
        """A rollout of these tokens, with p and h of each."""
        states = np.zeros((len(tokens), 2)) if hidden is None else np.array(hidden, np.float64)
        states = states + TAG * (np.arange(len(tokens))[:, None] + 1 + len(self.table))
        for state, p in zip(states, probabilities, strict=True):
            self.table[tuple(state.tolist())] = list(p)
        return MeasuredRow(
            tokens=torch.tensor(tokens, dtype=torch.int64),
            is_policy=torch.arange(len(tokens)) >= guidance,
            log_probs=torch.zeros(len(tokens), dtype=torch.float64),
            reference_log_probs=None,
            entropy=None,
            hidden=torch.tensor(states),
            label=label,
        )

    def log_probs(self, hidden: Tensor) -> Tensor:
        assert 0 < len(hidden) <= self.chunk_tokens
        rows = [self.table[tuple(state)] for state in hidden.tolist()]
        return torch.tensor(rows, dtype=torch.float64).log()


@dataclass
class LinearLayer:
    """A real output layer in double precision: log-softmax of hidden @ weight."""

    weight: Tensor  # [H, V]
    chunk_tokens: int = 100

    def log_probs(self, hidden: Tensor) -> Tensor:
        assert 0 < len(hidden) <= self.chunk_tokens
        return (hidden @ self.weight).log_softmax(1)


def random_rows(
    seed: int, *, lengths: Sequence[int], labels: Sequence[float], vocabulary: int, size: int
) -> list[MeasuredRow]:
    """Random tokens and hidden states."""
    torch.manual_seed(seed)
    return [
        MeasuredRow(
            tokens=torch.randint(vocabulary, (length,)),
            is_policy=torch.ones(length, dtype=torch.bool),
            log_probs=torch.zeros(length, dtype=torch.float64),
            reference_log_probs=None,
            entropy=None,
            hidden=torch.randn(length, size, dtype=torch.float64),
            label=label,
        )
        for length, label in zip(lengths, labels, strict=True)
    ]
