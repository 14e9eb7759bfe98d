"""Terms added to the loss of every trained token, beside the policy term. N tokens.

Refuses to know coefficients: a penalty is a quantity, and its metric is its mean.
Tensors are used through their methods only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import LossInputs

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


def entropy(inputs: LossInputs) -> Tensor:
    """Entropy of the policy at each token; with a negative coefficient it is a bonus."""
    assert inputs.entropy is not None, "the objective does not list Signal.ENTROPY in `needs`"
    return inputs.entropy


def _reference(inputs: LossInputs) -> Tensor:
    reference = inputs.reference_log_probs
    assert reference is not None, "the objective does not list Signal.REFERENCE in `needs`"
    return reference
