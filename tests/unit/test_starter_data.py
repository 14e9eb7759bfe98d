"""The starter's data sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from grpo.errors import UserError
from orchestration.starter.data import distinct_problems, write_datasets
from orchestration.starter.world import DIFFICULTIES, is_solved, parsed_prompt


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_and_heldout_share_no_prompt_and_repeat_none(tmp_path: Path) -> None:
    written = write_datasets(tmp_path, num_train=1000, num_heldout=200)
    train = [row["prompt"] for row in _rows(written.train)]
    heldout = [row["prompt"] for row in _rows(written.heldout)]
    assert len({*train, *heldout}) == 1200


def test_another_seed_never_trains_on_a_heldout_prompt(tmp_path: Path) -> None:
    heldout = _rows(write_datasets(tmp_path / "a", num_train=1, seed=0).heldout)
    train = _rows(write_datasets(tmp_path / "b", num_train=2000, seed=1).train)
    assert not {row["prompt"] for row in heldout} & {row["prompt"] for row in train}


def test_difficulties_are_balanced_and_columns_agree_with_the_prompt(tmp_path: Path) -> None:
    rows = _rows(write_datasets(tmp_path, num_train=100, num_heldout=200).heldout)
    assert Counter(row["difficulty"] for row in rows) == dict.fromkeys(DIFFICULTIES, 40)
    for row in rows:
        columns = ["id", "prompt", "answer", "solution", "hint", "difficulty", "domain"]
        assert list(row) == columns
        problem = parsed_prompt(str(row["prompt"]))
        assert row["difficulty"] == problem.difficulty
        assert row["answer"] == str(problem.answer)
        assert is_solved(problem, str(row["solution"]))
        hint = parsed_prompt(str(row["hint"]))
        assert hint.answer == problem.answer
        assert hint.difficulty == problem.difficulty - problem.difficulty // 2
        assert row["domain"] == ("products" if "*" in str(row["prompt"]) else "sums")
    assert len({row["id"] for row in rows}) == 200


def test_the_same_seed_writes_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = write_datasets(tmp_path / "a", num_train=50, num_heldout=10, seed=4)
    second = write_datasets(tmp_path / "b", num_train=50, num_heldout=10, seed=4)
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.heldout.read_bytes() == second.heldout.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_train=0"):
        write_datasets(tmp_path, num_train=0)


def test_asking_for_more_problems_than_there_are_is_refused_and_does_not_go_on_for_ever() -> None:
    with pytest.raises(UserError, match="are used up"):
        distinct_problems(300_000, seed=0, split="heldout", difficulties=(2,))
