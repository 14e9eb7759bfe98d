"""Training prompts from easy to hard."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from grpo.errors import UserError
from grpo.types import Prompt
from orchestration.config import DataConfig
from orchestration.prompt_order import PromptOrder, easy_to_hard
from orchestration.prompts import PromptSet


def prompts(*levels: object) -> list[Prompt]:
    return [
        Prompt(id=str(i), text="q", tokens=np.zeros(1, np.int32), columns={"level": level})
        for i, level in enumerate(levels)
    ]


def order(found) -> list[int]:
    return [int(prompt.id) for prompt in found]


def test_prompts_come_from_small_to_large_and_equal_ones_as_in_the_file() -> None:
    assert order(easy_to_hard(prompts(3, 1, 2.5, 1), column="level", values=())) == [1, 3, 2, 0]


def test_named_tiers_come_in_the_order_in_which_they_are_named() -> None:
    tiers = prompts("olympiads", "cn_contest", "amc_aime")
    values = ("cn_contest", "amc_aime", "olympiads")
    assert order(easy_to_hard(tiers, column="level", values=values)) == [1, 2, 0]


def test_every_epoch_has_the_same_order() -> None:
    sorted_prompts = easy_to_hard(prompts(2, 1), column="level", values=())
    given = PromptOrder([PromptSet(name="levels", prompts=sorted_prompts)], seed=0, shuffle=False)
    assert order(given.at(group) for group in range(4)) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("levels", "column", "values", "message"),
    [
        ((1, 2), "tier", (), "no column 'tier'.*found: level"),
        ((1, "a"), "level", (), "numbers and text"),
        ((None, 1), "level", (), "expected a number or text"),
        (("a", "b"), "level", ("a",), "none of data.curriculum.values"),
    ],
)
def test_what_cannot_be_ordered_is_named(levels, column, values, message: str) -> None:
    with pytest.raises(UserError, match=message):
        easy_to_hard(prompts(*levels), column=column, values=values)


def test_an_order_that_would_be_shuffled_is_refused() -> None:
    with pytest.raises(ValidationError, match="set shuffle: false"):
        DataConfig.model_validate({"train": "x.jsonl", "curriculum": {"column": "level"}})
