"""What the learner measures in a step, added up over micro-batches and ranks.

Refuses to know the model. N tokens of a micro-batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from grpo.objective import LossInputs
from grpo.types import Origin, TrainRow
from learner.backend import Backend


class Stopwatch:
    """Seconds by name; the same name adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


class Tally:
    """The sums of one step; `version` is of the weights that the learner holds before it."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._losses: dict[str, Tensor] = {}
        self._gaps: dict[str, Tensor] = {}
        self._largest_gap = 0.0

    def add(
        self, inputs: LossInputs, rows: Sequence[TrainRow], losses: Mapping[str, Tensor]
    ) -> None:
        """Count one micro-batch; every rank hands in the same names."""
        gaps, largest = agreement_sums(inputs, rows, self._version)
        add(self._losses, losses)
        add(self._gaps, gaps)
        self._largest_gap = max(self._largest_gap, largest)

    def metrics(self, backend: Backend, *, num_updates: int) -> dict[str, float]:
        """Losses as means over the updates; how far policy and engine agree."""
        losses = reduced(backend, self._losses)
        gaps = reduced(backend, self._gaps)
        largest = max(backend.collect(self._largest_gap))
        means = {name: total / num_updates for name, total in losses.items()}
        return means | agreement(gaps, largest)


def reduced(backend: Backend, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums over all ranks. Every rank has the same names: each ran a micro-batch."""
    total = backend.sum_over_ranks(torch.stack(list(sums.values())))
    return dict(zip(sums, total.tolist(), strict=True))


def add(total: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Add sums to sums of the same names, in double precision."""
    for name, term in terms.items():
        value = term.detach().double()
        total[name] = total[name] + value if name in total else value


def agreement_sums(
    inputs: LossInputs, rows: Sequence[TrainRow], version: int
) -> tuple[dict[str, Tensor], float]:
    """Sums that compare the policy at the start of the step with what the engine reported.

    Fresh tokens were sampled by the very weights that the learner holds: a difference is
    numerical, or a bug; the largest one is the second result. Counted tokens are all that some
    policy sampled and the loss weighs. Tokens sampled after another context cannot be compared.
    """
    by_policy = np.concatenate(
        [(row.origins == Origin.POLICY) & (not row.is_cross_context) for row in rows]
    )
    by_these_weights = np.concatenate([row.versions for row in rows]) == version
    device = inputs.weights.device
    fresh = torch.from_numpy(by_policy & by_these_weights).to(device)
    counted = torch.from_numpy(by_policy).to(device) & (inputs.weights != 0)
    ours, theirs = inputs.proximal_log_probs, inputs.behaviour_log_probs
    gaps = (ours - theirs).abs()[fresh]
    difference = (ours.double() - theirs.double())[fresh]
    sums = {
        "gap": gaps.sum(),
        # k3 of KL(engine || learner) on tokens of the engine. Double: d**2 / 2 of d = 1e-7 is lost
        # in float32.
        "kl": (difference.expm1() - difference).sum(),
        "prob_gap": (ours.exp() - theirs.exp()).abs()[fresh].sum(),
        "num_fresh": fresh.sum(),
        "importance": (ours - theirs).exp()[counted].sum(),
        "num_counted": counted.sum(),
    }
    return sums, gaps.max().item() if len(gaps) else 0.0


def agreement(sums: Mapping[str, float], largest: float) -> dict[str, float]:
    """The metrics of `agreement_sums`, absent where there is no token to compare."""
    metrics = {"log_prob_gap/num_tokens": sums["num_fresh"]}
    if sums["num_fresh"]:
        metrics["log_prob_gap/max"] = largest
        metrics["log_prob_gap/mean"] = sums["gap"] / sums["num_fresh"]
        metrics["log_prob_gap/kl"] = sums["kl"] / sums["num_fresh"]
        metrics["log_prob_gap/prob_mean"] = sums["prob_gap"] / sums["num_fresh"]
    if sums["num_counted"]:
        metrics["importance/mean"] = sums["importance"] / sums["num_counted"]
    return metrics
