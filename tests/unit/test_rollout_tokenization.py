"""Text to tokens and back: where every token ends, and which models are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from grpo.errors import UserError
from rollout_workers.tokenization import Tokenization
from tests.unit.rollout_models import EOS_ID, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def plain(tmp_path: Path) -> Tokenization:
    byte_tokenizer().save_pretrained(tmp_path)
    return Tokenization(str(tmp_path))


@pytest.fixture
def chat(tmp_path: Path) -> Tokenization:
    byte_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    return Tokenization(str(tmp_path))


def test_a_character_of_several_tokens_ends_with_the_last_of_them(plain: Tokenization) -> None:
    # a: 1 byte; e acute: 2; a Chinese character: 3; an emoji: 4; b: 1
    text, ends = plain.decode(plain.encode_text("a\u00e9\u6f22\U0001f600b"))
    assert text == "a\u00e9\u6f22\U0001f600b"
    assert ends.tolist() == [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5]


def test_text_cut_inside_a_character_still_ends_at_its_length(plain: Tokenization) -> None:
    text, ends = plain.decode(plain.encode_text("ab\u6f22")[:-1])
    assert text.startswith("ab") and len(text) > 2
    assert ends.tolist()[:2] == [1, 2]
    assert ends[-1] == len(text)


def test_bytes_that_are_no_text_keep_the_ends_in_order(plain: Tokenization) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 400).astype(np.int32)
    text, ends = plain.decode(tokens)
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] == len(text)


def test_ends_cut_the_text_where_its_tokens_do(plain: Tokenization) -> None:
    words = ["\u00fcber ", "na\u00efve ", "x+1=2\n", "\u6f22\u5b57 ", "\U0001f600"]
    tokens = np.concatenate([plain.encode_text(word) for word in words])
    text, ends = plain.decode(tokens)
    counts = np.cumsum([len(plain.encode_text(word)) for word in words])
    assert [text[: ends[count - 1]] for count in counts] == [
        "".join(words[: place + 1]) for place in range(len(words))
    ]


def test_special_tokens_are_not_in_the_text_and_have_no_width(plain: Tokenization) -> None:
    tokens = np.append(plain.encode_text("ok"), np.int32(EOS_ID))
    text, ends = plain.decode(tokens)
    assert text == "ok"
    assert ends.tolist() == [1, 2, 2]


def test_no_tokens_decode_to_no_text(plain: Tokenization) -> None:
    text, ends = plain.decode(np.zeros(0, np.int32))
    assert text == ""
    assert ends.shape == (0,)


def test_a_tokenizer_that_drops_the_first_space_gets_its_ends_right(tmp_path: Path) -> None:
    # Llama's way: a word begins with a mark that is a space everywhere but at the start.
    vocabulary = {"\u2581one": 0, "\u2581two": 1, "s": 2, "<eos>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    text, ends = Tokenization(str(tmp_path)).decode(np.array([0, 1, 2], np.int32))
    assert text == "one twos"
    assert ends.tolist() == [3, 7, 8]


def test_a_prompt_goes_through_the_chat_template(chat: Tokenization) -> None:
    assert chat.decode(chat.encode_prompt("hi"))[0] == "[user]hi>"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert chat.decode(chat.encode_prompt(messages))[0] == "[system]be brief[user]hi>"


def test_a_prompt_without_a_template_is_encoded_as_it_is(plain: Tokenization) -> None:
    assert plain.encode_prompt("1+2=").tolist() == plain.encode_text("1+2=").tolist()


def test_messages_without_a_template_are_refused(plain: Tokenization) -> None:
    with pytest.raises(UserError, match="chat template"):
        plain.encode_prompt([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        Tokenization(str(tmp_path))


def test_a_folder_with_a_model_but_no_tokenizer_is_named(tmp_path: Path) -> None:
    """transformers itself would build an empty tokenizer and say nothing."""
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenization(str(tmp_path))


def test_what_the_chat_template_refuses_is_the_user_s_mistake(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="roles must alternate"):
        Tokenization(str(tmp_path)).encode_prompt("hi")


def test_every_end_token_of_the_generation_config_stops(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 256]}')
    assert Tokenization(str(tmp_path)).stop_ids == (256, 257)


def test_decoding_token_by_token_agrees_with_decoding_every_prefix(plain: Tokenization) -> None:
    tokens = plain.encode_text("na\u00efve \u6f22\u5b57, \U0001f600!")
    ids = tokens.tolist()
    text, ends = plain.decode(tokens)
    assert ends.tolist() == plain._exact_ends(ids, text).tolist()
