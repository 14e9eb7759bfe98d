"""Weights on the policy term that need the learner's own log-probabilities; never a gradient.

A gate leaves the penalties alone. Tensors are used through their methods only. N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import LossInputs


def truncated_importance(inputs: LossInputs, *, cap: float) -> Tensor:
    """The smaller of cap and policy at the start of the step / policy that sampled. [N]

    Truncated importance sampling: corrects for rollouts by older weights and by an engine whose
    numbers differ from the learner's. With both equal it is 1. A token that nobody sampled
    (guidance) has its proximal log-probability as behaviour, hence 1.
    """
    log_ratio = inputs.proximal_log_probs - inputs.behaviour_log_probs
    return log_ratio.detach().exp().clamp(max=cap)
