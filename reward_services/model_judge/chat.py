"""From a question to a model's tokens; the same in training and in both engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase


def question_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """In the model's own chat template; a base model without one reads the plain texts."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
    )
    return str(text)


def question_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """A chat template writes its own special tokens."""
    text = question_text(tokenizer, messages)
    has_template = tokenizer.chat_template is not None
    return list(tokenizer(text, add_special_tokens=not has_template)["input_ids"])
