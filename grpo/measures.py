"""Measures that several algorithms share: [T] streams that the learner hands over as they are.

Each is one `Measure`, found by the driver as `rollout.measured[name]`. Refuses to know what they
are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo.objective import Measure, MeasuredRow, OutputLayer, Signal

if TYPE_CHECKING:
    from torch import Tensor


def reference_log_probs(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """Log-probability of each token under the reference policy. [T] each"""
    return [_present(row.reference_log_probs, Signal.REFERENCE) for row in rows]


def entropies(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """Entropy of the present policy's distribution at each token. [T] each"""
    return [_present(row.entropy, Signal.ENTROPY) for row in rows]


def log_probs_now(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """Log-probability of each token under the present policy, in the context it is trained on."""
    return [row.log_probs for row in rows]


def _present(stream: Tensor | None, signal: Signal) -> Tensor:
    assert stream is not None, f"a measure that needs {signal} was asked without it"
    return stream


REFERENCE = Measure(name="reference", fn=reference_log_probs, needs=frozenset({Signal.REFERENCE}))
ENTROPY = Measure(name="entropy", fn=entropies, needs=frozenset({Signal.ENTROPY}))
LOG_PROBS_NOW = Measure(name="log_probs_now", fn=log_probs_now)
