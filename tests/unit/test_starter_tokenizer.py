"""The starter tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from orchestration.starter.behaviours import Behaviour, written_trace
from orchestration.starter.tokenizer import built_tokenizer
from orchestration.starter.training import new_model
from orchestration.starter.world import DIFFICULTIES, generated


@pytest.mark.parametrize("behaviour", list(Behaviour))
def test_traces_survive_the_round_trip_in_text_and_in_tokens(behaviour: Behaviour) -> None:
    tokenizer, rng = built_tokenizer(), random.Random(0)
    for difficulty in DIFFICULTIES:
        for index in range(20):
            trace = written_trace(generated(0, index, difficulty), behaviour, rng)
            ids = tokenizer(trace, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == trace
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_token_texts_join_to_the_whole_text() -> None:
    tokenizer = built_tokenizer()
    ids = tokenizer("7+5=12\ncheck: 7+5=12\nanswer: 12")["input_ids"]
    assert "".join(tokenizer.decode([i]) for i in ids) == tokenizer.decode(ids)


def test_the_words_of_a_trace_are_one_token_each() -> None:
    tokenizer = built_tokenizer()
    assert tokenizer.tokenize("answer: 12") == ["answer: ", "1", "2"]
    ids = tokenizer("check: 7+5=12\n")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["check: ", *"7+5=12\n"]


def test_the_vocabulary_is_small_and_digits_are_single_tokens() -> None:
    tokenizer = built_tokenizer()
    assert len(tokenizer) <= 64
    assert all(len(tokenizer(str(digit))["input_ids"]) == 1 for digit in range(10))


def test_the_chat_template_opens_an_assistant_turn_and_ends_it_with_eos() -> None:
    tokenizer = built_tokenizer()
    user = {"role": "user", "content": "7 +5"}
    assistant = {"role": "assistant", "content": "7+5=12\nanswer: 12"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>7 +5<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert whole == prompt + assistant["content"] + tokenizer.eos_token
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(prompt)["input_ids"]


def test_beside_a_qwen2_model_the_saved_tokenizer_still_loads_unchanged(tmp_path: Path) -> None:
    tokenizer = built_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    # With a model's config in the folder AutoTokenizer picks the class by the model's type.
    new_model(tokenizer, seed=0).config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>7 +5<|end|><|assistant|>7+5=12\ncheck: 7+5=12\nanswer: 12<|eos|>"
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert loaded.decode(ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert loaded.chat_template == tokenizer.chat_template
