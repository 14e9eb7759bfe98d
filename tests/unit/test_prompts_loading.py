"""Data sets as prompts: which layouts are read, and how a bad line is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from grpo.errors import UserError
from grpo.types import Int32
from orchestration.config import DataConfig
from orchestration.prompts import PromptSet, load_prompts


class CharacterTokenizer:
    """One token a character; messages are joined by their roles."""

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> Int32:
        if isinstance(prompt, str):
            return self.encode_text(prompt)
        return self.encode_text("".join(f"<{m['role']}>{m['content']}" for m in prompt))

    def encode_text(self, text: str) -> Int32:
        return np.array([ord(c) for c in text], np.int32)


def _loaded(path: Path, limit: int = 100, **data: object) -> PromptSet:
    config = DataConfig.model_validate({"train": str(path), **data})
    (source,) = config.training_sources
    return load_prompts(source, CharacterTokenizer(), max_prompt_length=limit)


def _written(path: Path, *rows: Mapping[str, object] | str) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_a_json_line_becomes_a_prompt_with_all_its_columns(tmp_path: Path) -> None:
    row = {"prompt": "7 +5", "answer": 12, "solution": "7+5=12", "level": [1, 2]}
    (prompt,) = _loaded(_written(tmp_path / "t.jsonl", row, "")).prompts
    assert (prompt.id, prompt.text, prompt.reference) == ("t.jsonl:1", "7 +5", "12")
    assert prompt.tokens.tolist() == [ord(c) for c in "7 +5"]
    assert len(prompt.solution_tokens) == len("7+5=12")
    assert prompt.columns == row


def test_columns_may_have_other_names_and_functions_still_find_the_prompt(tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", {"question": "q", "final": "a", "kind": "easy"})
    (prompt,) = _loaded(
        path, prompt_column="question", answer_column="final", domain_column="kind"
    ).prompts
    assert (prompt.reference, prompt.domain, prompt.columns["prompt"]) == ("a", "easy", "q")


def test_the_layout_of_verl_is_understood_from_parquet(tmp_path: Path) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (prompt,) = _loaded(path).prompts
    assert prompt.reference == "4"
    assert prompt.text == "2 + 2?"
    assert prompt.columns["extra_info"] == {"index": 0}


def test_a_data_set_saved_by_hugging_face_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).save_to_disk(tmp_path / "set")
    assert [p.text for p in _loaded(tmp_path / "set").prompts] == ["a", "b"]


BAD_ROWS = {
    "broken JSON": ('{"prompt": "a"', "t.jsonl line 2, column 15: this is no valid JSON"),
    "no object": ("[1]", "t.jsonl line 2: found list; expected an object"),
    "missing column": ({"promt": "a"}, "no column 'prompt'; found: promt"),
    "number as prompt": ({"prompt": 7}, "'prompt' is int; expected text or a list of messages"),
    "empty prompt": ({"prompt": "  "}, "'prompt' is empty"),
    "no messages": ({"prompt": []}, "'prompt' is list; expected text or a list of messages"),
    "bad message": ({"prompt": [{"role": "user"}]}, "message 0 of 'prompt' is {'role': 'user'}"),
    "list as answer": ({"prompt": "a", "answer": [1]}, "the answer is [1]; expected text"),
    "long prompt": ({"prompt": "a" * 101}, "the prompt has 101 tokens, but sampling.max_prompt"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_line_is_named_with_its_number(
    tmp_path: Path, row: Mapping[str, object] | str, message: str
) -> None:
    path = _written(tmp_path / "t.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(UserError) as error:
        _loaded(path)
    assert message in str(error.value)
    assert "t.jsonl line 2" in str(error.value)


def test_every_bad_line_is_reported_up_to_ten(tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", *[{"prompt": 1}] * 12)
    with pytest.raises(UserError) as error:
        _loaded(path)
    assert "t.jsonl has 12 bad rows:" in str(error.value)
    assert "t.jsonl line 10:" in str(error.value)
    assert "and 2 more" in str(error.value)


def test_a_column_that_the_recipe_names_must_be_there(tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", {"prompt": "a"})
    assert _loaded(path).prompts[0].reference is None
    with pytest.raises(UserError, match=r"no column 'target', which data\.answer_column names"):
        _loaded(path, answer_column="target")


def test_long_prompts_are_dropped_and_counted_if_asked(tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", {"prompt": "abc"}, {"prompt": "abcd"})
    loaded = _loaded(path, limit=3, on_long_prompt="drop")
    assert [p.text for p in loaded.prompts] == ["abc"]
    assert loaded.num_dropped == 1
    with pytest.raises(UserError, match="found no prompt of at most 2 tokens"):
        _loaded(path, limit=2, on_long_prompt="drop")


def test_a_file_that_cannot_be_read_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        _loaded(tmp_path / "absent.jsonl")
    (tmp_path / "t.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="no readable Parquet file"):
        _loaded(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        _loaded(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="found no prompt"):
        _loaded(_written(tmp_path / "t.jsonl", ""))
