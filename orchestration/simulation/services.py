"""What the simulated roles share: service times, lengths of completions, and what they cost us.

Refuses to know the Protocols that the roles implement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

from orchestration.recipe import Recipe

QUANTILES = 4096  # of the lengths; the longest is passed by one rollout in 8192
SEED_RANGE = 1 << 63
GOLDEN = 0.6180339887498949  # consecutive groups are spread evenly by its multiples


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that a simulated role may take time for, with every null resolved."""

    tokens_per_s: float  # of one rollout in its place
    places: int  # rollouts that a worker generates at a time
    lengths: Sequence[Sequence[int]]  # of like groups, one of which is drawn for each group; rising
    prompt_tokens: int
    scorer_s: float
    constant_share: float
    learner_tokens_per_s: float
    publish_s: float
    load_s: float

    def length(self, group: int, seed: int) -> int:
        """Tokens of the completion that is sampled under this seed, without a budget."""
        lengths = self.lengths[int(_spread_evenly(group) * len(self.lengths))]
        return lengths[seed * len(lengths) // SEED_RANGE]

    def is_constant(self, group: int) -> bool:
        """Whether all rollouts of the group are scored alike."""
        return _spread_evenly(group) < self.constant_share


def services(recipe: Recipe, lengths: Sequence[Sequence[int]] | None = None) -> Services:
    """Those of the recipe's simulation section; `lengths` instead of the ones drawn from it."""
    given, sampling = recipe.simulation, recipe.sampling
    places = given.worker_rollouts or recipe.rollout.max_concurrent_rollouts
    mean = given.mean_tokens or max(1.0, sampling.max_completion_length / 2)
    return Services(
        tokens_per_s=given.worker_tokens_per_s / places,
        places=places,
        lengths=lengths or (long_tailed_lengths(mean, given.spread),),
        prompt_tokens=given.prompt_tokens or max(1, sampling.max_prompt_length // 2),
        scorer_s=given.scorer_s,
        constant_share=given.constant_share,
        learner_tokens_per_s=given.learner_tokens_per_s,
        publish_s=given.publish_s,
        load_s=given.load_s,
    )


def long_tailed_lengths(mean: float, spread: float) -> tuple[int, ...]:
    """Quantiles of a log-normal distribution, rising; each is at least one token."""
    if spread == 0:
        return (max(1, round(mean)),)
    logarithms = NormalDist(math.log(mean) - spread**2 / 2, spread)
    return tuple(
        max(1, round(math.exp(logarithms.inv_cdf((place + 0.5) / QUANTILES))))
        for place in range(QUANTILES)
    )


class ServiceCpu:
    """CPU seconds that the simulated roles themselves use: they are not the driver's."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the block, which must not wait."""
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started


def _spread_evenly(group: int) -> float:
    """In [0, 1)."""
    return (group + 1) * GOLDEN % 1.0
