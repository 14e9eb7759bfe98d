"""The per-token streams of a micro-batch as an objective reads them, and which is no number.

Refuses to know the backend and what becomes of the loss. N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.objective import LossInputs
from grpo.types import Origin, TrainRow
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


def non_finite_cause(inputs: LossInputs, rows: Sequence[TrainRow], loss: float) -> str:
    """Which number of which token spoilt the loss, as far as it can be told."""
    streams = {
        "weight": inputs.weights,
        "advantage": inputs.advantages,
        "policy weight": inputs.policy_weights,
        "log-probability of the rollout engine": inputs.behaviour_log_probs,
        "log-probability of the reference": inputs.reference_log_probs,
        "log-probability of the policy": inputs.log_probs,
        "entropy": inputs.entropy,
    }
    for name, values in streams.items():
        bad = [] if values is None else (~torch.isfinite(values)).nonzero().flatten().tolist()
        if values is not None and bad:
            row = int(inputs.row[bad[0]])
            token = int((inputs.row[: bad[0]] == row).sum())
            return (
                f"the {name} is {values[bad[0]].item()} at completion token {token} of rollout "
                f"{rows[row].index} of group {rows[row].group} (and of {len(bad) - 1} more tokens "
                f"of its micro-batch), so the loss is {loss}"
            )
    groups = sorted({row.group for row in rows})
    return f"the loss of groups {groups} is {loss} although every input is finite"
