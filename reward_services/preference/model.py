"""A trained preference model: utilities of prefixes, for a scorer and for measuring.

Refuses to answer with another encoder than the one it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grpo.errors import UserError
from reward_services.asked_rollouts import AskedRollouts
from reward_services.preference.encoder import Encoder, tokenizer_fingerprint
from reward_services.preference.head import HeadFacts, UtilityHead, load_head, read_facts
from reward_services.preference.prefixes import PrefixRow, prefix_row
from reward_services.user_functions import Verdict


class PreferenceModel:
    """The encoder and the head on top of it."""

    def __init__(self, encoder: Encoder, head: UtilityHead) -> None:
        self._encoder = encoder
        self._head = head

    @torch.inference_mode()
    def utilities(self, rows: Sequence[PrefixRow]) -> list[Tensor]:
        """For each row one number per prefix; a difference of two is the logit of preferring."""
        return [self._head(features) for features in self._encoder.features(rows)]

    def verdicts(self, asked: AskedRollouts) -> list[Verdict]:
        """The utility of each span of a batch; a span that is no prefix is a failure."""
        rows = [prefix_row(rollout) for rollout in asked.rollouts]
        read = [place for place, row in enumerate(rows) if row.ends]
        utilities = self.utilities([rows[place] for place in read])
        found = {
            (place, end): _verdict(value)
            for place, values in zip(read, utilities, strict=True)
            for end, value in zip(rows[place].ends, values.tolist(), strict=True)
        }
        spans = [(number, asked.rollouts[number].spans[place]) for number, place in asked.places]
        return [
            found[number, end] if start == 0 else _no_prefix(start)
            for number, (start, end) in spans
        ]


def loaded_model(folder: Path, *, encoder: str | None) -> PreferenceModel:
    """What `covey preference train` wrote; `encoder` None: found where it was then."""
    return PreferenceModel(*loaded_parts(folder, encoder=encoder))


def loaded_parts(folder: Path, *, encoder: str | None) -> tuple[Encoder, UtilityHead]:
    """Encoder and head of a folder; UserError if the encoder has changed since."""
    facts = read_facts(folder)
    model = facts.model if encoder is None else encoder
    frozen = Encoder(model, dtype=facts.encoder_dtype, largest_surprise=facts.largest_surprise)
    _require_same(folder, facts, model, frozen)
    return frozen, load_head(folder, facts)


def require_tokenizer(folder: Path, model: str) -> None:
    """UserError unless the model that answers has the vocabulary of the preference model."""
    facts = read_facts(folder)
    if tokenizer_fingerprint(model) != facts.tokenizer:
        raise UserError(
            f"the preference model in {folder} was trained on the tokens of {facts.model}, but "
            f"{model} has another vocabulary: train it for this model, with "
            "covey preference train RECIPE"
        )


def _require_same(folder: Path, facts: HeadFacts, model: str, encoder: Encoder) -> None:
    found = {
        "weights": (encoder.fingerprint, facts.encoder),
        "vocabulary": (tokenizer_fingerprint(model), facts.tokenizer),
    }
    for what, (now, then) in found.items():
        if now != then:
            raise UserError(
                f"{model} has other {what} (sha256 {now[:12]}) than the encoder that the "
                f"preference model in {folder} was trained on ({then[:12]}): give back that model, "
                "or train again with covey preference train RECIPE"
            )


def _no_prefix(start: int) -> Verdict:
    failure = f"span from token {start} on: a preference model judges prefixes [0, t) only"
    return Verdict(value=None, failure=failure)


def _verdict(value: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict(value=None, failure=f"utility {value}; expected a finite number")
    return Verdict(value=value)
