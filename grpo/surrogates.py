"""The policy term: per-token losses whose gradient raises what has a positive advantage.

Refuses to know how losses are averaged. Tensors are used through their methods only. N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.objective import LossInputs, Surrogate

if TYPE_CHECKING:
    from torch import Tensor

# exp() of more overflows float32 and the gradient of the branch not taken becomes 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


def clipped(
    log_ratio: Tensor,
    inputs: LossInputs,
    *,
    low: float,
    high: float,
    delta: float | None = None,
) -> Surrogate:
    """PPO-clip: -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio).

    high > low is clip-higher (DAPO, arXiv:2503.14476 eq. 10). `delta` also bounds r in the
    unclipped branch, so that a negative advantage cannot weigh more than delta (two-sided
    clipping of INTELLECT-2, arXiv:2505.07291). r = 1.25, A = 1, low = high = 0.2: -1.2, clipped.
    """
    advantages = inputs.advantages
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = ratio if delta is None else ratio.clamp(max=delta)
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    clipped_high = (advantages > 0) & (ratio > 1.0 + high)
    if delta is not None:
        clipped_high = clipped_high | ((advantages < 0) & (ratio > delta))
    return Surrogate(
        loss=-(free * advantages).minimum(bounded * advantages),
        clipped_low=(advantages < 0) & (ratio < 1.0 - low),
        clipped_high=clipped_high,
    )
