"""Weights on the policy term that need the learner's own log-probabilities; never a gradient.

A gate leaves the penalties alone. Importance is 1 on cross-context tokens: their ratio is taken to
the policy that sampled them already. Tensors are used through their methods only. N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.rows import row_mean, row_sum

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import LossInputs

MAX_LOG_WEIGHT = 20.0  # exp() of more overflows float32 once multiplied


def truncated_importance(inputs: LossInputs, *, cap: float) -> Tensor:
    """The smaller of cap and policy at the start of the step / policy that sampled. [N]

    Truncated importance sampling: corrects for rollouts by older weights and by an engine whose
    numbers differ from the learner's. With both equal it is 1. A token that nobody sampled
    (guidance) has its proximal log-probability as behaviour, hence 1.
    """
    log_ratio = inputs.proximal_log_probs - inputs.behaviour_log_probs
    return _same_context(log_ratio.detach().exp().clamp(max=cap), inputs)


def truncated_sequence_importance(inputs: LossInputs, *, cap: float) -> Tensor:
    """The smaller of cap and the product of a row's token weights, on each of its tokens. [N]

    Token log-weights 0, 1.2, 0 and cap 2: exp(1.2) = 3.32, hence 2.
    """
    return _same_context(_row_importance(inputs).clamp(max=cap), inputs)


def masked_importance(inputs: LossInputs, *, low: float, high: float) -> Tensor:
    """The weight of a token if it lies in [low, high], else 0: MIS, IcePop with 0.5 and 5. [N]"""
    weight = _log_weight(inputs).exp()
    return _same_context(weight * _within(weight, low=low, high=high), inputs)


def masked_sequence_importance(inputs: LossInputs, *, low: float, high: float) -> Tensor:
    """The product of a row's token weights if it lies in [low, high], else 0: MIS per answer. [N]

    Weights 3.32 and 0.67 with bounds 0 and 3: 0 and 0.67.
    """
    weight = _row_importance(inputs)
    return _same_context(weight * _within(weight, low=low, high=high), inputs)


def geometric_filter(inputs: LossInputs, *, low: float, high: float) -> Tensor:
    """The token's weight where the geometric mean of its row's weights is in [low, high]. [N]

    The mean only decides; the weight of a token that stays is its own and is not bounded.
    """
    mean = row_mean(_log_weight(inputs), inputs).exp()
    weight = _log_weight(inputs).exp() * _within(mean, low=low, high=high)
    return _same_context(weight, inputs)


def off_policy_filter(inputs: LossInputs, *, delta: float) -> Tensor:
    """0 on answers to be made less likely that the policy has already left, else 1. [N]

    Left: the mean of log(policy that sampled / policy now) over the row exceeds delta.
    DeepSeek-V3.2, after TRL, which suggests delta 0.5. A good answer is never taken out.
    """
    gap = row_mean(inputs.behaviour_log_probs - inputs.log_probs.detach(), inputs)
    is_left = (inputs.advantages < 0) & (gap > delta)
    return _same_context((~is_left).to(gap.dtype), inputs)


def probability_weight(
    inputs: LossInputs,
    *,
    alpha: float,
    mu: float,
    scale: float,
    centre: float,
    low: float,
    high: float,
) -> Tensor:
    """A weight that grows with the token's probability p: clip(alpha (sigmoid(x) - mu), low, high).

    x = scale (p - centre). alpha 2, mu 0.25, scale 9, centre 0, low 1, high 1.4: 1 up to p = 0.12,
    1.2163 at 0.2, 1.4 from 0.33. [N]
    """
    p = inputs.log_probs.detach().exp()
    return ((scale * (p - centre)).sigmoid().sub(mu) * alpha).clamp(low, high)


def linear_probability_weight(inputs: LossInputs, *, share: float) -> Tensor:
    """share * p + 1 - share, p the token's probability (arXiv:2505.12929). [N]

    share 0.3: 0.73 at p = 0.1, 0.97 at 0.9.
    """
    return share * inputs.log_probs.detach().exp() + (1 - share)


def _same_context(importance: Tensor, inputs: LossInputs) -> Tensor:
    """1 where another context was sampled from: there the gap is what the loss is about."""
    return importance.masked_fill(inputs.is_cross_context, 1.0)


def _log_weight(inputs: LossInputs) -> Tensor:
    gap = (inputs.proximal_log_probs - inputs.behaviour_log_probs).detach()
    return gap.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT)


def _row_importance(inputs: LossInputs) -> Tensor:
    log_weight = row_sum(_log_weight(inputs), inputs)
    return log_weight.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()


def _within(values: Tensor, *, low: float, high: float) -> Tensor:
    return ((values >= low) & (values <= high)).to(values.dtype)
