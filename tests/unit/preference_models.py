"""A preference model with an untrained head on the starter model, and rollouts as it wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from grpo.types import Group, Prompt, Rollout
from reward_services.preference.encoder import Encoder, tokenizer_fingerprint
from reward_services.preference.head import HeadFacts, UtilityHead, save_head
from rollout_workers.tokenization import Tokenization
from tests.unit.seed_groups import a_rollout
from tests.unit.small_project import MODEL


def an_encoder(*, largest_surprise: bool = True) -> Encoder:
    return Encoder(str(MODEL), dtype="float32", largest_surprise=largest_surprise)


def written_model(folder: Path, *, model: Path = MODEL) -> HeadFacts:
    """An untrained head that fits the starter model."""
    encoder = Encoder(str(model), dtype="float32", largest_surprise=True)
    torch.manual_seed(0)
    head = UtilityHead(encoder.num_features, 16)
    facts = HeadFacts(
        model=str(model),
        encoder=encoder.fingerprint,
        tokenizer=tokenizer_fingerprint(str(model)),
        encoder_dtype="float32",
        largest_surprise=True,
        num_features=encoder.num_features,
        hidden_units=16,
    )
    save_head(folder, head, facts)
    return facts


def answered(prompt: str, texts: Sequence[str]) -> Group:
    """The starter model's tokens of these answers, each with its end of sequence."""
    tokenization = Tokenization(str(MODEL))
    context = tokenization.encode_prompt(prompt)
    return Group(
        id=0,
        prompt=Prompt(id="p", text=prompt, tokens=context),
        rollouts=tuple(_rollout(tokenization, i, text, context) for i, text in enumerate(texts)),
    )


def _rollout(tokenization: Tokenization, index: int, text: str, context: np.ndarray) -> Rollout:
    tokens = [*tokenization.encode_text(text).tolist(), tokenization.eos_id]
    _, ends = tokenization.decode(np.array(tokens, np.int32))
    plain = a_rollout(index, tokens, text=text)
    return replace(plain, context=context, token_ends=ends)
