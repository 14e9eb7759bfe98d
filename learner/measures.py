"""What the learner measures in a step, added up over micro-batches and ranks.

Refuses to know the model and the backend. N tokens of a micro-batch.
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


def add(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
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
    policy sampled and the loss weighs.
    """
    by_policy = np.concatenate([row.origins for row in rows]) == Origin.POLICY
    by_these_weights = np.concatenate([row.versions for row in rows]) == version
    device = inputs.weights.device
    fresh = torch.from_numpy(by_policy & by_these_weights).to(device)
    counted = torch.from_numpy(by_policy).to(device) & (inputs.weights != 0)
    ours, theirs = inputs.proximal_log_probs, inputs.behaviour_log_probs
    gaps = (ours - theirs).abs()[fresh]
    sums = {
        "gap": gaps.sum(),
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
        metrics["log_prob_gap/prob_mean"] = sums["prob_gap"] / sums["num_fresh"]
    if sums["num_counted"]:
        metrics["importance/mean"] = sums["importance"] / sums["num_counted"]
    return metrics
