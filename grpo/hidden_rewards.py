"""Token hidden rewards: how much a token's gradient raises the right answers of its own group.

Learner's half: the score s = <g, M h> of each token, with M = sum of g h^T over the tokens of right
answers, g = onehot(token) - probabilities, h the hidden state that predicts it. Driver's half: what
NTHR (arXiv:2505.18830) and THR (arXiv:2510.03669) make of the scores. Tensors are used through
their methods only. T tokens, V ids that occur in the group, H hidden size, G rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from grpo.objective import Measure, MeasuredRow, OutputLayer, Signal
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import total_outcome
from grpo.types import Float64, Group, Origin

if TYPE_CHECKING:
    from torch import Tensor

NAME = "hidden_reward"  # of the measure

Eta = Literal["imbalance", "right_share", "wrong_share", "zero", "one"]


def hidden_rewards(rows: Sequence[MeasuredRow], layer: OutputLayer | None) -> list[Tensor]:
    """Score of every token against all tokens of the group's right answers (label 1). [T] each

    s = sum over right tokens of <g, g'> <h, h'>, in time linear in tokens: the [V, H] matrix M is
    made once. V are the ids that occur in the group, whose probabilities are sliced and not
    renormalised. Given tokens take no part and score 0. No right answer: all 0.
    """
    assert layer is not None, "hidden rewards need the policy's output layer"
    places = _places(rows, layer)
    right = [row for row in rows if row.label == 1]
    if places is None or not right:
        return [row.log_probs.float() * 0 for row in rows]
    matrix: Tensor | None = None
    for row in right:
        for _, errors, hidden in _prediction_errors(row, layer, places):
            term = errors.T @ hidden
            matrix = term if matrix is None else matrix + term
    assert matrix is not None
    return [_scores(row, layer, places, matrix) for row in rows]


def right_labels(
    group: Group, state: State, *, weights: Mapping[str, float], right_above: float
) -> Float64:
    """1 where the weighted sum of the raw outcomes exceeds `right_above`, else 0; NaN unjudged."""
    outcomes = total_outcome(group, weights=weights)
    return np.where(np.isnan(outcomes), np.nan, (outcomes > right_above).astype(np.float64))


def weakened_negatives(
    group: Group,
    state: State,
    *,
    weights: Mapping[str, float],
    right_above: float,
    threshold: float,
    eta: Eta,
) -> PerToken:
    """NTHR: eta on tokens of wrong answers that score above tau, else 1 (arXiv:2505.18830). [T]

    tau = threshold * the smallest mean score of a right answer. eta imbalance: 2 |p - 1/2|, p the
    share of right answers; or p, 1 - p, 0, 1. Right scores 0.29, 0.03, wrong 0.248, 0.05,
    threshold 1: tau 0.16, so 0 and 1. Groups without both right and wrong answers: 1.
    """
    labels = right_labels(group, state, weights=weights, right_above=right_above)
    factors = [np.ones(rollout.num_tokens) for rollout in group.rollouts]
    share, tau = _right_share(labels), smallest_mean(group, labels)
    if not 0 < share < 1 or np.isnan(tau):
        return factors
    eta_value = _eta(eta, share)
    return [
        np.where(scores > threshold * tau, eta_value, 1.0) if label == 0 else factor
        for label, scores, factor in zip(labels, _streams(group), factors, strict=True)
    ]


def steered(
    group: Group,
    state: State,
    *,
    weights: Mapping[str, float],
    right_above: float,
    threshold: float,
    steer: float,
    mask: bool,
) -> PerToken:
    """THR: 1[|THR| > tau] (1 + steer * sign(THR)), THR the score, negated on wrong answers. [T]

    arXiv:2510.03669, reconstructed. tau as in `weakened_negatives`. THR 0.29, 0.03, -0.248, -0.05,
    tau 0, steer 0.2: 1.2, 1.2, 0.8, 0.8. Without `mask` nothing is set to 0. Groups without both
    right and wrong answers, and answers that nobody judged: 1.
    """
    labels = right_labels(group, state, weights=weights, right_above=right_above)
    tau = smallest_mean(group, labels)
    is_mixed = 0 < _right_share(labels) < 1 and not np.isnan(tau)
    factors = []
    for label, scores in zip(labels, _streams(group), strict=True):
        if not is_mixed or np.isnan(label):
            factors.append(np.ones(len(scores)))
            continue
        reward = scores if label == 1 else -scores
        factor = 1.0 + steer * np.sign(reward)
        factors.append(np.where(np.abs(reward) > threshold * tau, factor, 0.0) if mask else factor)
    return factors


def smallest_mean(group: Group, labels: Float64) -> float:
    """The smallest mean score of a right answer's own tokens; NaN without one."""
    means = [
        float(scores[is_own].mean())
        for rollout, label, scores in zip(group.rollouts, labels, _streams(group), strict=True)
        for is_own in [rollout.origins == Origin.POLICY]
        if label == 1 and is_own.any()
    ]
    return min(means, default=np.nan)


def hidden_reward_metrics(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    weights: Mapping[str, float],
    right_above: float,
) -> Mapping[str, float]:
    """Mean score of the tokens of right and of wrong answers; absent where there are none."""
    found: dict[str, list[Float64]] = {"right": [], "wrong": []}
    for item in groups:
        labels = right_labels(item.group, state, weights=weights, right_above=right_above)
        for label, scores in zip(labels, _streams(item.group), strict=True):
            if not np.isnan(label):
                found["right" if label == 1 else "wrong"].append(scores)
    return {
        f"{NAME}/{name}": float(np.concatenate(parts).mean())
        for name, parts in found.items()
        if sum(map(len, parts))
    }


def _eta(eta: Eta, share: float) -> float:
    return {
        "imbalance": 2 * abs(share - 0.5),
        "right_share": share,
        "wrong_share": 1 - share,
        "zero": 0.0,
        "one": 1.0,
    }[eta]


def _right_share(labels: Float64) -> float:
    judged = labels[~np.isnan(labels)]
    return float(judged.mean()) if len(judged) else 0.0


def _streams(group: Group) -> list[Float64]:
    return [rollout.measured[NAME].astype(np.float64) for rollout in group.rollouts]


def _places(rows: Sequence[MeasuredRow], layer: OutputLayer) -> Tensor | None:
    """Place of each id of the whole vocabulary among those of the group; -1: does not occur."""
    first = next((row for row in rows if row.hidden is not None and len(row.tokens)), None)
    if first is None or first.hidden is None:
        return None
    places = first.tokens.new_full((layer.log_probs(first.hidden[:1]).shape[1],), -1)
    for row in rows:
        places[row.tokens] = 0
    occurring = places == 0
    places[occurring] = occurring.cumsum(0)[occurring] - 1
    return places


def _prediction_errors(
    row: MeasuredRow, layer: OutputLayer, places: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Piece by piece: which tokens, g [n, V] and h [n, H]; both 0 on given tokens."""
    assert row.hidden is not None, "hidden rewards need hidden states"
    occurring = places >= 0
    for start in range(0, len(row.tokens), layer.chunk_tokens):
        piece = slice(start, start + layer.chunk_tokens)
        hidden, own = row.hidden[piece], row.is_policy[piece].unsqueeze(1)
        errors = -layer.log_probs(hidden)[:, occurring].exp()
        tokens = places[row.tokens[piece]].unsqueeze(1)
        errors = errors.scatter_add(1, tokens, errors.new_ones(tokens.shape))
        yield piece, errors * own, hidden.to(errors.dtype)


def _scores(row: MeasuredRow, layer: OutputLayer, places: Tensor, matrix: Tensor) -> Tensor:
    scores = matrix.new_zeros(len(row.tokens))
    for piece, errors, hidden in _prediction_errors(row, layer, places):
        scores[piece] = ((errors @ matrix) * hidden).sum(1)
    return scores


MEASURE = Measure(name=NAME, fn=hidden_rewards, needs=frozenset({Signal.HIDDEN}))
