"""Which tokens are trained. A mask takes a token out of the loss, the penalties and the mean.

Refuses to know rewards. Shapes: T tokens.
"""

from __future__ import annotations

import numpy as np

from grpo.pipeline import State
from grpo.types import Bool, Group, Origin


def policy_tokens_only(group: Group, state: State) -> list[Bool]:
    """Only what the policy wrote, the end-of-sequence token included."""
    return [rollout.origins == Origin.POLICY for rollout in group.rollouts]


def not_truncated(group: Group, state: State) -> list[Bool]:
    """DAPO's overlong filtering: no token of an answer that the token budget cut off.

    The answer's reward still counts in its group's mean and deviation (arXiv:2503.14476
    section 3.4).
    """
    return [np.full(rollout.num_tokens, not rollout.is_truncated) for rollout in group.rollouts]
