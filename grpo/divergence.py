"""How far the answers of a group disagree at each position, and the weights of TW-GRPO.

Learner's half: one number per position, over the whole vocabulary, streamed over positions.
Driver's half: those numbers as weights. Positions count completion tokens from the first one.
Tensors are used through their methods only. T tokens, V vocabulary, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from grpo.objective import MeasuredRow, OutputLayer
from grpo.pipeline import PerToken, State
from grpo.rewards import CONSTANT_RANGE
from grpo.types import Group

if TYPE_CHECKING:
    from torch import Tensor

NAME = "divergence"  # of the measure
MAX_LOG_GAP = 11.0  # of the released code: exp() of more says nothing
NORM_EPS = 1e-8  # of the released code

Mode = Literal["code", "kl"]
Ended = Literal["uniform", "excluded"]


def position_divergence(
    rows: Sequence[MeasuredRow], layer: OutputLayer | None, *, mode: Mode, ended: Ended
) -> list[Tensor]:
    """K_t, the same for every answer that has a token t (arXiv:2505.24718). [T] each

    mode code: mean over answers of sum over V of exp(d) - d - 1, d = mean log-probability of the
    answers - own, within +-11, as released; mode kl: mean of KL(own || mean distribution). Where an
    answer has ended its distribution is uniform, as released, or it is left out.
    """
    assert layer is not None, "the divergence of distributions needs the policy's output layer"
    longest = max((len(row.tokens) for row in rows), default=0)
    streams = [row.log_probs.float() * 0 for row in rows]
    size = max(layer.chunk_tokens // max(len(rows), 1), 1)
    for start in range(0, longest, size):
        stop = min(start + size, longest)
        divergence = _DIVERGENCES[mode](*_distributions(rows, layer, start, stop, ended))
        for row, stream in zip(rows, streams, strict=True):
            count = max(min(len(row.tokens), stop) - start, 0)
            stream[start : start + count] = divergence[:count]
    return streams


def divergence_weight(group: Group, state: State, *, alpha: float) -> PerToken:
    """1 + (alpha - 1) * K_t scaled to 0..1 over the group's positions. [T]

    K = 0, 0.213594, 0.739529 and alpha 1.7: 1, 1.202177, 1.7. Equal everywhere: 1.
    """
    streams = [rollout.measured[NAME].astype(np.float64) for rollout in group.rollouts]
    values = np.concatenate([*streams, np.zeros(0)])
    if not len(values) or np.ptp(values) <= CONSTANT_RANGE:
        return [np.ones(len(stream)) for stream in streams]
    low, spread = values.min(), np.ptp(values) + NORM_EPS
    return [1.0 + (alpha - 1.0) * (stream - low) / spread for stream in streams]


def _distributions(
    rows: Sequence[MeasuredRow], layer: OutputLayer, start: int, stop: int, ended: Ended
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities [n, V] and counts [n, 1] (0: left out) of each row at these positions."""
    parts: list[Tensor | None] = []
    for row in rows:
        assert row.hidden is not None, "the divergence of distributions needs hidden states"
        hidden = row.hidden[start:stop]
        parts.append(layer.log_probs(hidden) if len(hidden) else None)
    like = next(part for part in parts if part is not None)  # the longest answer is there
    uniform = -float(np.log(like.shape[1]))
    log_probs, counts = [], []
    for part in parts:
        num_there = 0 if part is None else len(part)
        full = like.new_full((stop - start, like.shape[1]), uniform)
        if part is not None:
            full[:num_there] = part
        count = like.new_ones((stop - start, 1))
        if ended == "excluded":
            count[num_there:] = 0.0
        log_probs.append(full)
        counts.append(count)
    return log_probs, counts


def _mean(values: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    terms = [value * count for value, count in zip(values, counts, strict=True)]
    total, number = terms[0], counts[0]
    for term, count in zip(terms[1:], counts[1:], strict=True):
        total, number = total + term, number + count
    return total / number.clamp(min=1.0)


def _unweighted(log_probs: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    mean = _mean(log_probs, counts)
    gaps = [(mean - own).clamp(-MAX_LOG_GAP, MAX_LOG_GAP) for own in log_probs]
    # expm1: exp(d) - d - 1 of a small d would be round-off, and V of them a large sum of it.
    return _mean([(gap.expm1() - gap).sum(1, keepdim=True) for gap in gaps], counts).squeeze(1)


def _kl_to_mean(log_probs: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    tiny = float(np.finfo(np.float32).tiny)
    mean = _mean([own.exp() for own in log_probs], counts).clamp(min=tiny).log()
    terms = [(own.exp() * (own - mean)).sum(1, keepdim=True) for own in log_probs]
    return _mean(terms, counts).squeeze(1)


_DIVERGENCES: dict[Mode, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "code": _unweighted,
    "kl": _kl_to_mean,
}
