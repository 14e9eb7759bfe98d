"""DPO on pairs: how much more, or less, likely each of two answers is to be made.

A pair is a group of two rows. Refuses to know how pairs are found, and what an answer is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo.objective import RowScore

MAX_EXPONENT = 700.0  # exp() of more overflows


def preference_advantages(rows: Sequence[RowScore], *, beta: float) -> list[float]:
    """The advantages that make the log-likelihood's gradient that of DPO's loss on the pair.

    The better row comes with the label 1 - a, the worse with a - 1, a in [0, 0.5] the chance that
    the pair is the wrong way round (arXiv:2305.18290; smoothed: arXiv:2405.00451). With h the
    difference of log(policy now / reference) of the two answers, the reference being the policy
    at the start of the batch, the loss is -(1-a) log s(beta h) - a log s(-beta h) and

        advantage = +-beta (s(-beta h) - a)

    h = 5, beta 0.1, a = 0: +-0.0378. A pair that was left twice comes as four rows.
    """
    if len(rows) % 2:
        raise ValueError(f"a pair has two rows with a token that is trained, found {len(rows)}")
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [push for better, worse in pairs for push in _pushes(better, worse, beta)]


def doubt_from_visits(better: int, worse: int) -> float:
    """How likely a pair is the wrong way round: min(1 - 1 / (1 + worse / max(1, better)), 1/2).

    arXiv:2405.00451, visits of two nodes of a search. 6 and 2: 0.25; 1 and 5: 0.5.
    """
    return min(1 - 1 / (1 + worse / max(1, better)), 0.5)


def _pushes(better: RowScore, worse: RowScore, beta: float) -> tuple[float, float]:
    assert better.advantage > 0 > worse.advantage, "the better row of a pair comes first"
    margin = beta * (better.log_ratio_sum - worse.log_ratio_sum)
    doubt = 1 - better.advantage
    push = beta * (1 / (1 + math.exp(min(margin, MAX_EXPONENT))) - doubt)
    return push, -push
