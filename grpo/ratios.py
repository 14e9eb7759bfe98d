"""How far the policy has moved since the start of the step, in log space. N tokens.

Refuses to know advantages. Tensors are used through their methods only: no torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.objective import LossInputs


def token_log_ratio(inputs: LossInputs) -> Tensor:
    """Log of policy now / policy at the start of the step, of each token alone. [N]"""
    return inputs.log_probs - inputs.proximal_log_probs
