"""The starter tokenizer: one token a character, plus the two words of a trace and the chat marks.

Knows nothing of arithmetic or of models.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

PAD, EOS = "<|pad|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, EOS, SYSTEM, USER, ASSISTANT, END)
WORDS = ("answer: ", "check: ")  # one token each keeps traces short, and so rollouts cheap
# The letters are never seen in training: they let a hint or a judge's prompt be written exactly.
CHARACTERS = string.digits + "+-*=:\n " + "/.,?()" + string.ascii_lowercase
MAX_TOKENS = 512  # prompt and completion together; matches the model's positions

_BYTE_NAMES = {" ": "\u0120", "\n": "\u010a"}  # how byte-level BPE writes the unprintable ones

# A completion, and with it an assistant message in a conversation, ends with the eos token.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}" + ASSISTANT + "{{ m['content'] }}" + EOS + "{% else %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def built_tokenizer(
    *, more_characters: str = "", more_words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer, built from nothing; the same entries every time, and more after them.

    Byte-level BPE without a merge. It has to be of the Qwen2 class: beside a Qwen2 model,
    AutoTokenizer rebuilds this class from the vocabulary and ignores any other pipeline.
    A character outside CHARACTERS and `more_characters` has no token and disappears.
    """
    written = CHARACTERS + more_characters
    characters = [_BYTE_NAMES.get(character, character) for character in written]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *characters])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    words = (*WORDS, *more_words)
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return tokenizer
