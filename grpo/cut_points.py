"""Where a rollout is cut to see what else could have followed: at tokens that the policy doubted.

Only tokens that the policy wrote are looked at. Refuses to know what grows from a cut. Shapes: T
tokens of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo.trees import last_piece_start, shared_tokens
from grpo.types import Bool, Float64, Origin, Prefix, Rollout


def surprising_places(
    rollouts: Sequence[Rollout], places: Sequence[int], *, num: int
) -> tuple[Prefix, ...]:
    """The prefixes before the `num` least likely tokens that these rollouts have, the worst first.

    TreeRL (arXiv:2506.11902): largest -log p. A rollout's last piece alone counts, as the tokens
    before it are its parent's; not its first token, nor one before which another rollout has
    branched off already.
    """
    found: list[tuple[float, int, int]] = []
    for place in places:
        rollout = rollouts[place]
        is_open = rollout.origins == Origin.POLICY
        is_open[: last_piece_start(rollout) + 1] = False
        is_open[_forks_of(rollout, [rollouts[other] for other in places])] = False
        tokens = np.flatnonzero(is_open).tolist()
        found += [(float(rollout.log_probs[token]), place, token) for token in tokens]
    return tuple(Prefix(rollout=place, end=token) for _, place, token in sorted(found)[:num])


def unlikely_cuts(rollout: Rollout, *, probability: float, interval: int) -> tuple[int, ...]:
    """Ends of prefixes: before every interval-th token of lower probability, from the first on.

    SPO-chain (arXiv:2505.23564). Probabilities 0.99, 0.5, 0.95, 0.3, 0.2, 0.97, 0.85, 0.6, below
    0.9, interval 2: before tokens 1, 4 and 7.
    """
    return tuple(np.flatnonzero(_is_unlikely(rollout, probability))[::interval].tolist())


def is_certain(rollout: Rollout, *, probability: float) -> Bool:
    """Tokens that the policy hardly could have chosen otherwise. [T]"""
    return _probabilities(rollout) > probability


def _forks_of(rollout: Rollout, others: Sequence[Rollout]) -> list[int]:
    """Where others have branched off from a rollout."""
    starts = [(last_piece_start(other), shared_tokens(rollout, other)) for other in others]
    return [start for start, shared in starts if start == shared < rollout.num_tokens]


def _is_unlikely(rollout: Rollout, probability: float) -> Bool:
    is_own: Bool = rollout.origins == Origin.POLICY
    return is_own & (_probabilities(rollout) < probability)


def _probabilities(rollout: Rollout) -> Float64:
    return np.exp(rollout.log_probs.astype(np.float64))
