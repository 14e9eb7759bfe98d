"""Objectives that use what a learner computes over whole groups, for the tests of the learner.

Module-level functions throughout: they travel to ranks in processes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from grpo.objective import (
    Learnable,
    Measure,
    MeasuredRow,
    Objective,
    OutputLayer,
    Penalty,
    ReferenceUpdate,
    RowScore,
    Signal,
)
from grpo.penalties import k2
from grpo.ratios import token_log_ratio
from grpo.surrogates import clipped, log_likelihood

PLAIN = Objective(log_ratio=token_log_ratio, surrogate=partial(clipped, low=0.2, high=0.2))


def contrast(rows: Sequence[RowScore], *, tau: float) -> list[float]:
    """Minus d/ds of tau logsumexp(s / tau) over the rows, s the mean log-probability."""
    scores = np.array([row.log_prob_sum / row.num_trained for row in rows]) / tau
    weights = np.exp(scores - scores.max())
    return list(-weights / weights.sum())


def contrast_loss(scores: Tensor, *, tau: float) -> Tensor:
    return tau * torch.logsumexp(scores / tau, 0)


def regression(rows: Sequence[RowScore], *, eta: float) -> list[float]:
    """Minus d/ds of the mean of ((s_i - s_j) - eta (r_i - r_j))^2, s the sum of log-ratios."""
    gaps = np.array([row.log_ratio_sum - eta * row.advantage for row in rows])
    return list(-4 / len(rows) * (gaps - gaps.mean()))


def length_weights(lengths: Tensor, value: Tensor) -> Tensor:
    """G softmax of value * length / 10: long answers weigh more where value is positive."""
    return len(lengths) * (value * lengths / 10).softmax(0)


def of_reference(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    assert layer is None
    return [row.reference_log_probs for row in rows if row.reference_log_probs is not None]


def of_entropy(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """Entropy times the label, so that a wrong label shows; 0 on given tokens."""
    return [row.entropy * row.label * row.is_policy for row in rows if row.entropy is not None]


def likeness(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """(sum of g h^T over the group), as g sees it through h: g = one-hot - probabilities. [T]

    Needs all of a group, its hidden states and the whole distribution of each token.
    """
    assert layer is not None
    total: Tensor | None = None
    for row in rows:
        outer = _errors(row, layer).T @ row.hidden  # [V, H]
        total = outer if total is None else total + outer
    assert total is not None
    return [((_errors(row, layer) @ total) * row.hidden).sum(-1) for row in rows]


def _errors(row: MeasuredRow, layer: OutputLayer) -> Tensor:
    assert row.hidden is not None
    parts = [
        layer.log_probs(part).exp().neg() for part in row.hidden.split(min(4, layer.chunk_tokens))
    ]
    errors = torch.cat(parts)
    errors[torch.arange(len(errors)), row.tokens] += 1
    return errors


MEASURES = (
    Measure(name="reference", fn=of_reference, needs=frozenset({Signal.REFERENCE})),
    Measure(name="entropy", fn=of_entropy, needs=frozenset({Signal.ENTROPY})),
    Measure(name="likeness", fn=likeness, needs=frozenset({Signal.HIDDEN})),
)
MEASURE_NAMES = tuple(measure.name for measure in MEASURES)
LENGTH_SCALAR = Learnable(
    name="length_preference", initial=0.5, learning_rate=0.1, weights=length_weights
)
CONTRAST = Objective(
    log_ratio=token_log_ratio, surrogate=log_likelihood, group_term=partial(contrast, tau=0.5)
)
REGRESSION = Objective(
    log_ratio=token_log_ratio, surrogate=log_likelihood, group_term=partial(regression, eta=0.3)
)
# Everything at once: what two ranks must agree on.
WHOLE_GROUPS = Objective(
    log_ratio=token_log_ratio,
    surrogate=log_likelihood,
    penalties=(Penalty(name="kl", coefficient=0.1, fn=k2),),
    needs=frozenset({Signal.REFERENCE}),
    measures=MEASURES,
    group_term=partial(contrast, tau=0.5),
    learnable=LENGTH_SCALAR,
    reference_update=ReferenceUpdate(every=1, decay=0.5),
    stage=REGRESSION,
)
