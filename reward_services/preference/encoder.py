"""The frozen model whose states describe prefixes: all prefixes of a rollout from one pass.

A prefix is the mean state of the prompt's tokens beside the mean state of its own. States of a
causal model do not see what follows, so the means of all prefixes are cumulative means of one
pass. Shapes: B rows, L tokens of the longest row, T tokens of a rollout, H state size, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from grpo.errors import UserError
from grpo.types import DType
from reward_services.preference.prefixes import PrefixRow
from reward_services.token_rows import device_of, padded, passes

MAX_TOKENS_PER_PASS = 8192  # padding included; bounds the memory of one forward pass
MAX_TOKENS_PER_LOGITS = 512  # [tokens, vocabulary] is the largest array of all; a slice at a time


class Encoder:
    """Owns the frozen model."""

    def __init__(self, model: str, *, dtype: DType, largest_surprise: bool) -> None:
        transformers_logging.disable_progress_bar()
        try:
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise UserError(
                f"encoder {model} cannot be loaded by transformers: {error}; expected the model "
                "that the preference model was trained on"
            ) from error
        self.fingerprint = weights_fingerprint(self._model)
        self._largest_surprise = largest_surprise
        self._device = device_of("auto")
        self._model.to(self._device).eval()

    @property
    def num_features(self) -> int:
        """2 H, and one more with the largest surprise."""
        return 2 * int(self._model.config.hidden_size) + int(self._largest_surprise)

    @torch.inference_mode()
    def features(self, rows: Sequence[PrefixRow]) -> list[Tensor]:
        """For each row [number of its ends, F], in float32 on the CPU."""
        found: dict[int, Tensor] = {}
        lengths = [len(row.context) + len(row.tokens) for row in rows]
        for places in passes(lengths, at_most=MAX_TOKENS_PER_PASS):
            part = self._one_pass([rows[place] for place in places])
            found |= dict(zip(places, part, strict=True))
        return [found[place] for place in range(len(rows))]

    def _one_pass(self, rows: Sequence[PrefixRow]) -> list[Tensor]:
        ids, mask = padded([_ids(row) for row in rows], self._device)
        states = self._model.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state  # [B, L, H]
        return [
            self._row_features(row, ids[place], states[place]) for place, row in enumerate(rows)
        ]

    def _row_features(self, row: PrefixRow, ids: Tensor, states: Tensor) -> Tensor:
        first, size = len(row.context), len(row.tokens)
        ends = torch.tensor(row.ends, device=self._device)
        own = states[first : first + size].float()
        sums = torch.cat([own.new_zeros(1, own.shape[1]), own.cumsum(0)])  # [T + 1, H]
        means = sums[ends] / ends.clamp(min=1)[:, None]  # the empty prefix is the zero vector
        question = states[:first].float().mean(0).expand(len(ends), -1)
        parts = [question, means]
        if self._largest_surprise:
            surprise = self._surprise(states[first - 1 : first + size - 1], ids[first:][:size])
            largest = torch.cat([surprise.new_zeros(1), surprise]).cummax(0).values
            parts.append(largest[ends][:, None])
        return torch.cat(parts, 1).cpu()

    def _surprise(self, states: Tensor, tokens: Tensor) -> Tensor:
        """-log p of each token, given the states before them. [T]"""
        head = self._model.get_output_embeddings()
        found = [
            torch.nn.functional.cross_entropy(head(part).float(), chosen, reduction="none")
            for part, chosen in zip(
                states.split(MAX_TOKENS_PER_LOGITS),
                tokens.split(MAX_TOKENS_PER_LOGITS),
                strict=True,
            )
        ]
        return torch.cat(found)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 of all parameters with their names, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(model: str) -> str:
    """sha256 of the vocabulary: equal ones give the same meaning to the same ids."""
    try:
        vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    except (OSError, ValueError) as error:
        raise UserError(f"model {model} holds no tokenizer: {error}") from error
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()


def _ids(row: PrefixRow) -> Tensor:
    return torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
