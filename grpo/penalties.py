"""Terms added to the loss of every trained token, beside the policy term. N tokens.

Refuses to know coefficients: a penalty is a quantity, and its metric is its mean.
Tensors are used through their methods only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import Gate, LossInputs

MAX_LOG_RATIO = 20.0  # exp() of more overflows
MAX_K3 = 10.0  # of a token; beyond it the estimate is noise and its gradient is dropped, as in verl


def k2(inputs: LossInputs) -> Tensor:
    """KL(policy || reference) estimated as d^2 / 2, d = log policy - log reference.

    As a loss its gradient is that of the reverse KL. d = 0.3: 0.045, gradient 0.3.
    """
    return (inputs.log_probs - _reference(inputs)).square() / 2


def k3(inputs: LossInputs) -> Tensor:
    """KL(policy || reference) estimated as exp(-d) - 1 + d, d = log policy - log reference.

    Never negative, low variance, biased as a gradient (arXiv:2402.03300 eq. 4).
    d = 0.3: 0.0408, gradient 1 - exp(-d) = 0.259.
    """
    minus_d = (_reference(inputs) - inputs.log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (minus_d.exp() - 1.0 - minus_d).clamp(max=MAX_K3)


def k3_plus(inputs: LossInputs) -> Tensor:
    """The value of k3 with the gradient of k2: low variance and right in gradient (verl's k3+).

    d = 0.3: 0.0408, gradient 0.3.
    """
    with_gradient = k2(inputs)
    return k3(inputs).detach() + with_gradient - with_gradient.detach()


def k3_unbiased(inputs: LossInputs) -> Tensor:
    """k3 times policy now / policy at the start of the step (DeepSeek-V3.2, after TRL).

    The ratio corrects for tokens that an older policy sampled; its gradient is part of the term.
    """
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    return k3(inputs) * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k1_from_start(inputs: LossInputs) -> Tensor:
    """KL(policy at the start of the step || policy) estimated as log start - log now.

    The tokens were sampled by the former, so that here, unlike in KL(policy || reference), the
    gradient -1 has the right mean. Log-probabilities -0.5 then, -0.4 now: -0.1.
    """
    return inputs.proximal_log_probs - inputs.log_probs


def k3_from_start(inputs: LossInputs) -> Tensor:
    """KL(policy at the start of the step || policy) estimated as r - 1 - log r, r = now / start.

    Never negative, and less noisy than `k1_from_start`. r = 1.1: 0.0047, gradient 0.1.
    """
    log_ratio = inputs.log_probs - inputs.proximal_log_probs
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1.0 - log_ratio


def beyond(mean: float, *, limit: float) -> float:
    """max(mean - limit, 0): as the scale of a penalty it makes a squared hinge's gradient.

    coefficient * beyond * gradient is that of coefficient / 2 * max(mean - limit, 0)^2. Mean 0.01,
    limit 1e-4: 0.0099.
    """
    return max(mean - limit, 0.0)


def weighted_k3(inputs: LossInputs, *, weight: Gate) -> Tensor:
    """w u - log(w u) - 1 with u = reference / policy: k3 drawn towards policy = w * reference.

    d = 0 and w = 1.4: 0.0635, not 0.
    """
    log_u = _reference(inputs) - inputs.log_probs + weight(inputs).detach().log()
    log_u = log_u.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_u.exp() - 1.0 - log_u).clamp(max=MAX_K3)


def entropy(inputs: LossInputs) -> Tensor:
    """Entropy of the policy at each token; with a negative coefficient it is a bonus."""
    assert inputs.entropy is not None, "the objective does not list Signal.ENTROPY in `needs`"
    return inputs.entropy


def _reference(inputs: LossInputs) -> Tensor:
    reference = inputs.reference_log_probs
    assert reference is not None, "the objective does not list Signal.REFERENCE in `needs`"
    return reference
