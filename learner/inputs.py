"""The per-token streams of a micro-batch as an objective reads them.

Refuses to know the backend and what becomes of the loss. N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.objective import LossInputs
from grpo.types import Origin
from learner.packing import Block


def stream(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """One array behind the other on the device. [N]"""
    return torch.from_numpy(np.concatenate(arrays)).to(device)


def inputs_of(
    block: Block,
    log_probs: Tensor,
    *,
    proximal: Tensor | None = None,  # None: this is the policy at the start of the step
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> LossInputs:
    """Every per-token stream of the block's rows beside their log-probabilities."""
    rows, device = block.rows, log_probs.device
    proximal = log_probs.detach() if proximal is None else proximal
    origins = stream([row.origins for row in rows], device)
    crosses = [np.full(len(row.tokens), row.is_cross_context) for row in rows]
    behaviour = stream([row.behaviour_log_probs for row in rows], device)
    return LossInputs(
        log_probs=log_probs,
        proximal_log_probs=proximal,
        # Nobody sampled a guidance token: its importance is 1 by definition.
        behaviour_log_probs=torch.where(origins == Origin.GUIDANCE, proximal, behaviour),
        reference_log_probs=reference,
        entropy=entropy,
        advantages=stream([row.advantages for row in rows], device),
        weights=stream([row.weights for row in rows], device),
        policy_weights=stream([row.policy_weights for row in rows], device),
        origins=origins,
        is_cross_context=stream(crosses, device),
        row=block.row.to(device),
        num_rows=len(rows),
    )
