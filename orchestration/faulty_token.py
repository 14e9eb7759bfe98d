"""The token that spoilt a step, with what the learner was given around it.

Refuses to know how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from grpo.types import Int32, Origin, TrainBatch, TrainRow

AROUND = 3  # tokens shown on either side


class Decoder(Protocol):
    """From tokens to text."""

    def decode(self, tokens: Int32) -> tuple[str, Int32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenToken:
    """One token as the learner was given it."""

    token: int  # place in the completion
    id: int
    text: str
    origin: str
    version: int
    weight: float
    advantage: float
    policy_weight: float
    behaviour_log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyToken:
    """Where a step broke."""

    group: int
    rollout: int
    token: int  # place in the completion
    context: str
    completion: str
    nearby: tuple[GivenToken, ...]


def faulty_token(
    batch: TrainBatch, place: tuple[int, int, int], decoder: Decoder
) -> FaultyToken | None:
    """The token at (group, rollout, completion token); None if no row of the batch has it."""
    group, rollout, token = place
    rows = [row for update in batch.updates for row in update]
    row = next((r for r in rows if (r.group, r.index) == (group, rollout)), None)
    if row is None or token >= len(row.tokens):
        return None
    near = range(max(0, token - AROUND), min(len(row.tokens), token + AROUND + 1))
    return FaultyToken(
        group=group,
        rollout=rollout,
        token=token,
        context=decoder.decode(row.context)[0],
        completion=decoder.decode(row.tokens)[0],
        nearby=tuple(_given(row, t, decoder) for t in near),
    )


def _given(row: TrainRow, token: int, decoder: Decoder) -> GivenToken:
    return GivenToken(
        token=token,
        id=int(row.tokens[token]),
        text=decoder.decode(np.asarray(row.tokens[token : token + 1], np.int32))[0],
        origin=Origin(int(row.origins[token])).name.lower(),
        version=int(row.versions[token]),
        weight=float(row.weights[token]),
        advantage=float(row.advantages[token]),
        policy_weight=float(row.policy_weights[token]),
        behaviour_log_prob=float(row.behaviour_log_probs[token]),
    )
