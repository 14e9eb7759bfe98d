"""Text to tokens and back, with the end of every token in the text.

The only place that touches a tokenizer; knows nothing of engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from grpo.errors import UserError
from grpo.types import Int32

Messages = Sequence[Mapping[str, str]]

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights of `model`, a folder or a hub id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError) as error:  # absent, or of another shape
        kind = "folder" if os.path.isdir(model) else "hub id"
        raise UserError(
            f"model {kind} {model} holds no tokenizer that transformers can load ({error}); "
            "expected tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers builds an empty tokenizer for a folder that has a config.json but none.
        raise UserError(
            f"model {model} holds no tokenizer (no vocabulary was found); expected tokenizer.json "
            "and tokenizer_config.json beside the weights"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model} names no end-of-sequence token, so no completion could "
            "ever end: set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _stop_ids(model: str, eos_id: int) -> tuple[int, ...]:
    """The tokenizer's end token and those of generation_config.json (chat models have two)."""
    try:
        named = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no such file
        return (eos_id,)
    extra = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys([eos_id, *extra]))


class Tokenization:
    """Prompts to token ids, and completions back to text."""

    def __init__(self, model: str) -> None:
        self._tokenizer = load_tokenizer(model)
        self.eos_id = int(self._tokenizer.eos_token_id)
        self.stop_ids = _stop_ids(model, self.eos_id)
        # The Rust tokenizer, which decodes a stream; the few Python ones have none.
        self._rust = getattr(self._tokenizer, "backend_tokenizer", None)

    def encode_prompt(self, prompt: str | Messages) -> Int32:
        """Tokens of a prompt, ready for the answer: with the chat template where there is one."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise UserError(
                    "the prompt is a list of messages, but the model's tokenizer has no chat "
                    "template: give plain text, or use a model with a template"
                )
            return np.asarray(tokenizer(prompt)["input_ids"], np.int32)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses the prompt: {error}") from error
        return self.encode_text(text)

    def encode_text(self, text: str) -> Int32:
        """Tokens of a piece of text; no special tokens are added."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, tokens: Int32) -> tuple[str, Int32]:
        """The text without special tokens, and the end of each token in it, in characters.

        A character of several tokens belongs to the last of them:
        the bytes of "a", then two halves of "e with acute", end at 1, 1, 2.
        """
        ids = [int(token) for token in tokens]
        text = self._text(ids)
        ends = self._streamed_ends(ids, text)
        if ends is None:
            ends = self._exact_ends(ids, text)
        return text, ends

    def _text(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _streamed_ends(self, ids: list[int], text: str) -> Int32 | None:
        """Ends from decoding token by token; None where that does not give `text`."""
        if self._rust is None:
            return None
        stream = DecodeStream(skip_special_tokens=True)
        ends = np.zeros(len(ids), np.int32)
        end = 0
        for position, token in enumerate(ids):
            piece = stream.step(self._rust, token)
            if piece is not None:
                if not text.startswith(piece, end):
                    return None
                end += len(piece)
            ends[position] = end
        if text[end:].strip(UNFINISHED):
            return None
        if len(ids) > 0:
            ends[-1] = len(text)  # the stream holds back a character cut off by the budget
        return ends

    def _exact_ends(self, ids: list[int], text: str) -> Int32:
        """Ends from decoding every prefix: quadratic, right for any tokenizer.

        Reached by tokenizers without a stream, and where the stream and the whole differ.
        """
        ends = np.zeros(len(ids), np.int32)
        for count in range(1, len(ids) + 1):
            ends[count - 1] = _shared(self._text(ids[:count]), text)
        if len(ids) > 0:
            ends[-1] = len(text)
        return np.maximum.accumulate(ends)


def _shared(prefix: str, text: str) -> int:
    """How many characters both begin with."""
    for place, (one, other) in enumerate(zip(prefix, text, strict=False)):
        if one != other:
            return place
    return min(len(prefix), len(text))
