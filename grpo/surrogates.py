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


def clipped_weight(
    log_ratio: Tensor, inputs: LossInputs, *, low: float | None, high: float
) -> Surrogate:
    """CISPO: -(r held within [low, high], no gradient) A log(policy): no token loses its gradient.

    `low` and `high` bound r itself: high 5 is TRL's cap, 0.8 and 1.28 are verl's clip range
    (arXiv:2506.13585 eq. 4). r = 1.49, A = -1, log-probability -0.8, high 1.28: -1.024.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().detach()
    weight = ratio.clamp(min=low, max=high)
    return Surrogate(
        loss=-weight * inputs.advantages * inputs.log_probs,
        clipped_low=ratio < weight,
        clipped_high=ratio > weight,
    )


def soft_gated(
    log_ratio: Tensor, inputs: LossInputs, *, tau_positive: float, tau_negative: float
) -> Surrogate:
    """SAPO: -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (arXiv:2511.20347).

    The gradient is r A at r = 1 and fades smoothly on both sides; nothing is clipped. r = 1.5,
    A = 1, tau 1: -2.4898, gradient -1.4100.
    """
    advantages = inputs.advantages
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_positive = (advantages > 0).to(advantages.dtype)
    tau = tau_negative + (tau_positive - tau_negative) * is_positive
    never = advantages.new_zeros(advantages.shape).bool()
    return Surrogate(
        loss=-4 / tau * (tau * (ratio - 1)).sigmoid() * advantages,
        clipped_low=never,
        clipped_high=never,
    )


def log_likelihood(log_ratio: Tensor, inputs: LossInputs) -> Surrogate:
    """REINFORCE: -A log(policy), no ratio. Right for one update per step, biased after the first.

    A = 1, log-probability -0.4: 0.4, gradient -1.
    """
    never = inputs.advantages.new_zeros(inputs.advantages.shape).bool()
    return Surrogate(
        loss=-inputs.advantages * inputs.log_probs, clipped_low=never, clipped_high=never
    )
