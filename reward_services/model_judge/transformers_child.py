"""The process that holds a judge model in transformers, for machines without vLLM.

There are few possible replies, so each next token is chosen among those that continue one of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from grpo.errors import UserError
from reward_services.function_child import Functions, serve_all
from reward_services.model_judge.chat import question_tokens
from reward_services.model_judge.local_model import REPLIES
from reward_services.model_judge.questions import Question, Reply, reply_text, too_long
from reward_services.token_rows import passes


class TransformersJudge:
    """Owns the model; answers a list of questions at a time."""

    def __init__(self, path: str, options: dict[str, object]) -> None:
        transformers_logging.disable_progress_bar()
        dtype = getattr(torch, str(options["dtype"]))
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"judge {path} cannot be loaded by transformers: {error}") from error
        self._room = int(str(options["max_model_len"])) - int(str(options["max_reply_tokens"]))
        self._max_concurrent = int(str(options["max_concurrent"]))
        self._max_reply_tokens = int(str(options["max_reply_tokens"]))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def replies(self, request: tuple[Sequence[Question], bool]) -> list[Reply]:
        """One reply each; a question that is too long has a failure instead."""
        questions, is_retry = request
        prompts = [question_tokens(self._tokenizer, q.messages) for q in questions]
        found = {
            place: Reply(text=None, failure=too_long(len(prompt), self._room))
            for place, prompt in enumerate(prompts)
            if len(prompt) > self._room
        }
        fitting = [place for place in range(len(prompts)) if place not in found]
        at_most = self._max_concurrent * max((len(prompts[i]) for i in fitting), default=1)
        for part in passes([len(prompts[place]) for place in fitting], at_most=at_most):
            places = [fitting[number] for number in part]
            texts = self._generated(
                [prompts[place] for place in places],
                [questions[place].num_steps for place in places],
                is_random=is_retry,
            )
            found |= {place: Reply(text=text) for place, text in zip(places, texts, strict=True)}
        return [found[place] for place in range(len(prompts))]

    @torch.inference_mode()
    def _generated(
        self, prompts: Sequence[list[int]], num_steps: Sequence[int], *, is_random: bool
    ) -> list[str]:
        padded = self._tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
        width = padded["input_ids"].shape[1]
        following = [self._following(count) for count in num_steps]

        def allowed(row: int, ids: torch.Tensor) -> list[int]:
            return following[row][tuple(ids[width:].tolist())]

        ids = self._model.generate(
            **padded.to(self._device),
            max_new_tokens=self._max_reply_tokens,
            prefix_allowed_tokens_fn=allowed,
            do_sample=is_random,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        return list(self._tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True))

    def _following(self, num_steps: int) -> dict[tuple[int, ...], list[int]]:
        """Which tokens may follow the beginning of a reply; after its end, the end again."""
        eos = self._tokenizer.eos_token_id
        found: dict[tuple[int, ...], list[int]] = _Ended([eos])
        for step in (None, *range(1, num_steps + 1)):
            tokens = self._tokenizer(reply_text(step), add_special_tokens=False)["input_ids"]
            for place, token in enumerate([*tokens, eos]):
                choices = found.setdefault(tuple(tokens[:place]), [])
                if token not in choices:
                    choices.append(token)
        return found


class _Ended(dict[tuple[int, ...], list[int]]):
    """Rows of a batch that have ended are still asked about."""

    def __init__(self, end: list[int]) -> None:
        super().__init__()
        self._end = end

    def __missing__(self, key: tuple[int, ...]) -> list[int]:
        return self._end


def main(path: str, options: str) -> None:
    """Load the model, then answer until the input ends."""

    def load() -> Functions:
        return {REPLIES: TransformersJudge(path, json.loads(options)).replies}

    serve_all(load)


if __name__ == "__main__":
    main(*sys.argv[1:])
