"""Advantages that depend on how likely whole answers are now: the group terms of DisCO and REBEL.

Each is minus the gradient of a group's own loss with respect to the score of each answer, so that
the learner's sum of per-token losses has that loss's gradient. Plain numbers without gradient; the
value of the learner's loss means nothing then. Refuses to know how scores were computed.
Shapes: G rows of a group that have a trained token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from grpo.objective import RowScore
from grpo.types import Float64

Score = Literal["log_likelihood", "ratio"]
Form = Literal["disco", "disco_b"]
Pairs = Literal["distinct", "all"]


def discriminated(
    scores: Sequence[RowScore], *, score: Score, form: Form, tau: float
) -> list[float]:
    """DisCO: G times the gradient of `discrimination` (arXiv:2505.12366).

    G / num_right for each right answer (advantage sent above 0), -G * softmax(s / tau) for the
    wrong ones (below 0; disco_b: -G / num_wrong). G undoes the mean over answers, so that what is
    left is a mean over prompts. Without right or without wrong answers: 0.
    """
    labels = np.array([row.advantage for row in scores])
    right, wrong = labels > 0, labels < 0
    gradient = np.zeros(len(scores))
    if not right.any() or not wrong.any():
        return [0.0] * len(scores)
    gradient[right] = len(scores) / right.sum()
    if form == "disco_b":
        gradient[wrong] = -len(scores) / wrong.sum()
    else:
        gradient[wrong] = -len(scores) * _softmax(answer_scores(scores, score=score)[wrong] / tau)
    return [float(value) for value in gradient]


def discrimination(values: Float64, labels: Float64, *, form: Form, tau: float) -> float:
    """What DisCO maximises for a prompt: mean right s - tau log mean wrong exp(s / tau).

    disco_b: mean right s - mean wrong s. s = -0.6333, -0.4, -0.675, -0.6, right, wrong,
    wrong, right, tau 10: -0.080112. Without right or without wrong answers: 0.
    """
    right, wrong = values[labels > 0], values[labels < 0]
    if not len(right) or not len(wrong):
        return 0.0
    if form == "disco_b":
        return float(right.mean() - wrong.mean())
    top = wrong.max()
    return float(right.mean() - top - tau * np.log(np.mean(np.exp((wrong - top) / tau))))


def answer_scores(scores: Sequence[RowScore], *, score: Score) -> Float64:
    """s of each answer: its mean log-probability, or its mean ratio. [G]"""
    if score == "ratio":
        return np.array([row.ratio_mean for row in scores])
    return np.array([row.log_prob_sum / max(row.num_trained, 1) for row in scores])


def regressed(scores: Sequence[RowScore], *, eta: float, pairs: Pairs) -> list[float]:
    """REBEL: G times minus the gradient of `pairwise_error` on each answer's log-ratio.

    The advantage sent is the reward, up to a constant of the group. x = s - eta * reward:
    -4 (x - mean x), times G / (G - 1) for distinct pairs (arXiv:2404.16767, a group at a time).
    Rewards 1, 0.2, 0, 1, s = 0, eta 1, all pairs: 1.8, -1.4, -2.2, 1.8.
    """
    gaps = _gaps(scores, eta=eta)
    if len(scores) < 2:
        return [0.0] * len(scores)
    factor = len(scores) / (len(scores) - 1) if pairs == "distinct" else 1.0
    return [float(value) for value in -4.0 * factor * (gaps - gaps.mean())]


def pairwise_error(scores: Sequence[RowScore], *, eta: float, pairs: Pairs) -> float:
    """What REBEL minimises: mean over pairs of ((s_i - s_j) - eta (r_i - r_j))^2 = 2 Var(x).

    Over distinct pairs the sample variance, over all ordered pairs, i = j included, the
    population's. s = 0.5, -0.2, rewards 1, 0.2, eta 1: 0.01 over distinct pairs.
    """
    if len(scores) < 2:
        return 0.0
    return float(2.0 * np.var(_gaps(scores, eta=eta), ddof=1 if pairs == "distinct" else 0))


def _gaps(scores: Sequence[RowScore], *, eta: float) -> Float64:
    log_ratios = np.array([row.log_ratio_sum for row in scores])
    return log_ratios - eta * np.array([row.advantage for row in scores])


def _softmax(values: Float64) -> Float64:
    shares: Float64 = np.exp(values - values.max())
    shares /= shares.sum()
    return shares
