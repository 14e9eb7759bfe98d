"""What VerIPO's check finds in an answer besides its outcome: consistency, repetition, length.

After arXiv:2505.19000; which thresholds the paper has was not found. Refuses to know pairs. Shapes:
G rollouts in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grpo.rewards import outcome_values
from grpo.types import Bool, Group, Int32

CONSISTENT = 0.5  # from this score on an answer follows from its reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One answer, checked."""

    is_right: bool
    is_consistent: bool
    is_repetitive: bool
    has_fair_length: bool  # neither cut off nor too short

    @property
    def is_penalised(self) -> bool:
        """Bad whatever its reasoning leads to."""
        return not self.is_right or self.is_repetitive or not self.has_fair_length

    @property
    def is_good(self) -> bool:
        return self.is_consistent and not self.is_penalised

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """The lowest first: wrong, then inconsistent, then repetitive or of a bad length."""
        return self.is_right, self.is_consistent, not self.is_repetitive and self.has_fair_length


def answer_qualities(
    group: Group,
    *,
    right: Bool,
    consistency_scorer: str | None,
    ngram: int,
    max_repetition: float,
    min_tokens: int,
) -> list[Quality]:
    """Each answer of the group, checked. Without a consistency scorer all answers are consistent.

    An answer that the consistency scorer does not judge counts as consistent.
    """
    consistent = np.ones(len(group.rollouts), bool)
    if consistency_scorer is not None:
        found = outcome_values(group, scorer=consistency_scorer)
        consistent = np.isnan(found) | (found >= CONSISTENT)
    return [
        Quality(
            is_right=bool(is_right),
            is_consistent=bool(is_consistent),
            is_repetitive=repeated_share(rollout.tokens, ngram=ngram) > max_repetition,
            has_fair_length=not rollout.is_truncated and rollout.num_tokens >= min_tokens,
        )
        for rollout, is_right, is_consistent in zip(group.rollouts, right, consistent, strict=True)
    ]


def repeated_share(tokens: Int32, *, ngram: int) -> float:
    """Share of an answer's runs of `ngram` tokens that occurred in it before.

    a b a b a b, pairs: ab ba ab ba ab, of which 3 of 5 are repeated.
    """
    if len(tokens) < ngram:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(tokens, ngram)
    return 1.0 - len(np.unique(runs, axis=0)) / len(runs)
