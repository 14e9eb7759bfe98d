"""Trains the head of a preference model on pairs of answers and measures it on held-out prompts.

The encoder is only read. Shapes: N pairs, R answers, F features, K fractions of
an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from grpo.errors import UserError
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.encoder import Encoder
from reward_services.preference.head import UtilityHead
from reward_services.preference.prefixes import PrefixRow
from reward_services.preference.questions import Question, question_pairs

NUM_BINS = 5  # of the confidence, 0.5 to 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Features of R answers, whole ones first and their fractions after them, and who won."""

    features: Tensor  # [K, R, F]
    winners: Tensor  # [N] which answer
    losers: Tensor  # [N]
    weights: Tensor  # [N] 1 / pairs of the same prompt, scaled to mean 1
    num_questions: int  # prompts with at least one pair


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs about which the model was about equally sure."""

    confidence: float  # mean of max(P, 1 - P)
    accuracy: float
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceReport:
    """How well whole answers are told apart; a coin has accuracy 0.5 and log loss 0.693."""

    num_questions: int
    num_pairs: int
    pair_accuracy: float  # a tie counts half
    log_loss: float
    calibration_error: float  # mean |accuracy - confidence| over pairs, by bins
    bins: tuple[CalibrationBin, ...]

    def as_json(self) -> dict[str, object]:
        """For report.json and --json."""
        return asdict(self)


def encoded_pairs(
    encoder: Encoder, questions: Sequence[Question], config: PreferenceConfig, *, seed: int
) -> Pairs:
    """Encode the answers that are in a pair, each once."""
    at_most = config.max_pairs_per_question
    chosen = [(q, question_pairs(q, at_most=at_most, seed=seed)) for q in questions]
    chosen = [(question, pairs) for question, pairs in chosen if pairs]
    if not chosen:
        raise UserError(
            f"none of {len(questions)} prompts has both a right and a wrong answer, so nothing "
            "can be compared: take more prompts (num_questions) or answers "
            "(rollouts_per_question), or prompts of a fitting difficulty"
        )
    places: dict[tuple[int, int], int] = {}
    for number, (_, pairs) in enumerate(chosen):
        for place in sorted({place for pair in pairs for place in pair}):
            places[number, place] = len(places)
    rows = [_row(chosen[number][0], place, config.prefix_fractions) for number, place in places]
    # A copy outside of inference mode: the head is trained on it.
    features = torch.stack(encoder.features(rows), 1).clone()  # [K, R, F]
    index = torch.tensor(
        [
            [places[number, winner], places[number, loser]]
            for number, (_, pairs) in enumerate(chosen)
            for winner, loser in pairs
        ]
    )
    weights = torch.cat([torch.full((len(pairs),), 1 / len(pairs)) for _, pairs in chosen])
    return Pairs(
        features=features,
        winners=index[:, 0],
        losers=index[:, 1],
        weights=weights / weights.mean(),
        num_questions=len(chosen),
    )


def trained_head(
    pairs: Pairs, config: PreferenceConfig, *, seed: int, start: UtilityHead | None = None
) -> UtilityHead:
    """Minimise -log sigmoid(utility(winner) - utility(loser)) with Adam.

    From a copy of `start`; None: from a seeded start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        units = config.hidden_units if start is None else start.inner.out_features
        head = UtilityHead(pairs.features.shape[-1], units)
    if start is not None:
        head.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_learning_rate)
    generator = torch.Generator().manual_seed(seed)
    fractions, size = len(pairs.features), len(pairs.winners)
    for _ in range(config.epochs):
        order = torch.randperm(fractions * size, generator=generator)
        for part in order.split(config.batch_size):
            fraction, pair = part // size, part % size
            winners = pairs.features[fraction, pairs.winners[pair]]
            losers = pairs.features[fraction, pairs.losers[pair]]
            gaps = head(winners) - head(losers)
            loss = (pair_losses(gaps) * pairs.weights[pair]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


def pair_losses(gaps: Tensor) -> Tensor:
    """-log sigmoid(gap): gaps 1, 0, -1 give 0.3133, 0.6931, 1.3133. [N]"""
    return torch.nn.functional.softplus(-gaps)


@torch.no_grad()
def measured(head: UtilityHead, pairs: Pairs) -> PreferenceReport:
    """On whole answers, every pair counted once."""
    utilities = head(pairs.features[0])
    return report_of(utilities[pairs.winners] - utilities[pairs.losers], pairs.num_questions)


def report_of(gaps: Tensor, num_questions: int) -> PreferenceReport:
    """From the gaps of utility between winners and losers."""
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    confidence = torch.sigmoid(gaps.double().abs())
    bins = _bins(confidence.numpy(), right.numpy())
    error = sum(abs(b.accuracy - b.confidence) * b.num_pairs for b in bins) / len(gaps)
    return PreferenceReport(
        num_questions=num_questions,
        num_pairs=len(gaps),
        pair_accuracy=float(right.mean()),
        log_loss=float(pair_losses(gaps.double()).mean()),
        calibration_error=error,
        bins=bins,
    )


def _bins(confidence: np.ndarray, right: np.ndarray) -> tuple[CalibrationBin, ...]:
    numbers = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    return tuple(
        CalibrationBin(
            confidence=float(confidence[inside].mean()),
            accuracy=float(right[inside].mean()),
            num_pairs=int(inside.sum()),
        )
        for number in range(NUM_BINS)
        if (inside := numbers == number).any()
    )


def _row(question: Question, place: int, fractions: Sequence[float]) -> PrefixRow:
    tokens = np.array(question.rollouts[place].tokens, np.int32)
    ends = [max(round(fraction * len(tokens)), 1) for fraction in (1.0, *fractions)]
    return PrefixRow(context=np.array(question.context, np.int32), tokens=tokens, ends=tuple(ends))
