"""The policy term: per-token losses whose gradient raises what has a positive advantage.

Refuses to know how losses are averaged. Tensors are used through their methods only. N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.objective import LossInputs, Surrogate
from grpo.types import Origin

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import SurrogateFn

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
    return _unclipped(-4 / tau * (tau * (ratio - 1)).sigmoid() * advantages, inputs)


def log_likelihood(log_ratio: Tensor, inputs: LossInputs) -> Surrogate:
    """REINFORCE: -A log(policy), no ratio. Right for one update per step, biased after the first.

    A = 1, log-probability -0.4: 0.4, gradient -1.
    """
    return _unclipped(-inputs.advantages * inputs.log_probs, inputs)


def unclipped(log_ratio: Tensor, inputs: LossInputs) -> Surrogate:
    """The policy gradient with its ratio and no bound: -r A. r = 1.25, A = 1: -1.25."""
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _unclipped(-ratio * inputs.advantages, inputs)


def shaped_probability(log_ratio: Tensor, inputs: LossInputs, *, gamma: float) -> Surrogate:
    """LUFFY's shaping of what another policy wrote: -A p / (p + gamma), p the token's probability.

    The behaviour probability counts as 1 and nothing is clipped; the gradient p gamma / (p +
    gamma)^2 is largest at p = gamma, so that rare tokens are learnt too (arXiv:2504.14945).
    p = 0.1, gamma 0.1, A = 1: -0.5, gradient -0.25.
    """
    p = inputs.log_probs.exp()
    return _unclipped(-inputs.advantages * p / (p + gamma), inputs)


def shaped_ratio(log_ratio: Tensor, inputs: LossInputs, *, gamma: float | None) -> Surrogate:
    """Guide-GRPO's ratio across contexts: -A r / (r + gamma), not clipped (arXiv:2506.13923).

    `gamma` None: every token brings its own gamma as its policy weight, which weighs nothing then.
    r = 1, gamma 0.85, A = 1: -0.5405, gradient -0.2484.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if gamma is not None:
        return _unclipped(-inputs.advantages * ratio / (ratio + gamma), inputs)
    # Divided by what the policy weight multiplies in afterwards. A token that weighs nothing stays
    # so, and must not divide by 0 in a branch that is not taken.
    own = inputs.policy_weights.masked_fill(inputs.policy_weights == 0, 1.0)
    return _unclipped(-inputs.advantages * ratio / (ratio + own) / own, inputs)


def by_origin(
    log_ratio: Tensor, inputs: LossInputs, *, policy: SurrogateFn, guidance: SurrogateFn
) -> Surrogate:
    """One surrogate for what the policy wrote, another for what it was given."""
    is_guidance = inputs.origins == Origin.GUIDANCE
    return _chosen(is_guidance, guidance(log_ratio, inputs), policy(log_ratio, inputs))


def by_context(
    log_ratio: Tensor, inputs: LossInputs, *, same: SurrogateFn, other: SurrogateFn
) -> Surrogate:
    """One surrogate for tokens sampled after the context they are trained on, another for the rest.

    Belongs to `ratios.cross_context_log_ratio`.
    """
    return _chosen(inputs.is_cross_context, other(log_ratio, inputs), same(log_ratio, inputs))


def _chosen(condition: Tensor, yes: Surrogate, no: Surrogate) -> Surrogate:
    return Surrogate(
        loss=yes.loss.where(condition, no.loss),
        clipped_low=yes.clipped_low.where(condition, no.clipped_low),
        clipped_high=yes.clipped_high.where(condition, no.clipped_high),
    )


def _unclipped(loss: Tensor, inputs: LossInputs) -> Surrogate:
    never = inputs.advantages.new_zeros(inputs.advantages.shape).bool()
    return Surrogate(loss=loss, clipped_low=never, clipped_high=never)
