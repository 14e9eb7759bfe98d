"""The learnable length preference of arXiv:2510.06870: one exponent weighs long against short.

Tensors are used through their methods only; the weights carry the gradient of the exponent. Shapes:
G rollouts in a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STD_EPS = 1e-8
MIN_BASE = 1e-6  # a length so far below the mean that the base would be negative


def preference_weights(lengths: Tensor, exponent: Tensor, *, scale: float) -> Tensor:
    """f = G softmax(h^exponent), h = 1 + scale * standardised length; they sum to G. [G]

    Population deviation. A softmax of the power itself, not of exponent * log h. Lengths 3, 2, 4,
    1, scale 1/9: all 1 at exponent 0; 1.0445, 0.9457, 1.1536, 0.8562 at 1. Equal lengths: all 1.
    """
    lengths = lengths.to(exponent.dtype)
    spread = lengths - lengths.mean()
    z = spread / (lengths.std(unbiased=False) + STD_EPS) * (lengths.max() > lengths.min())
    powers = (1.0 + scale * z).clamp(min=MIN_BASE) ** exponent
    return len(lengths) * powers.softmax(0)
