"""The order of prompts: exact shares, every prompt once an epoch, the same whatever was asked."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from grpo.types import Prompt
from orchestration.ledger import Entry, audited
from orchestration.mixture import Mixture
from orchestration.prompt_order import PromptOrder
from orchestration.prompts import PromptSet


def a_set(name: str, size: int, weight: float = 1.0) -> PromptSet:
    prompts = [
        Prompt(id=f"{name}:{i}", text=f"{name} {i}", tokens=np.array([i], np.int32), domain=name)
        for i in range(size)
    ]
    return PromptSet(name=name, weight=weight, prompts=tuple(prompts))


def an_order(*sets: PromptSet, seed: int = 3, shuffle: bool = True) -> PromptOrder:
    return PromptOrder(sets, seed=seed, shuffle=shuffle)


def ids(order: PromptOrder, groups: range) -> list[str]:
    return [order.at(group).id for group in groups]


def test_one_set_is_shuffled_by_seed_and_epoch_alone() -> None:
    order = an_order(a_set("a", 5))
    for epoch in (0, 1, 7):
        expected = np.random.default_rng([3, epoch]).permutation(5)
        found = ids(order, range(5 * epoch, 5 * epoch + 5))
        assert found == [f"a:{place}" for place in expected]


def test_three_to_one_is_dealt_out_so_that_every_four_groups_have_it() -> None:
    """Of n groups round(3/4 n) are of the first set: 1, 2, 2, 3; 4, 5, 5, 6."""
    for weights in ([3, 1], [0.3, 0.1]):
        mixture = Mixture(weights)
        assert [mixture.place(group)[0] for group in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]
        assert [mixture.place(group)[1] for group in range(8)] == [0, 1, 0, 2, 3, 4, 1, 5]
    assert [Mixture([1, 1]).place(group)[0] for group in range(4)] == [0, 1, 0, 1]


MIXTURES: list[tuple[list[float], float]] = [
    ([1], 0.0),
    ([2, 5], 0.5),
    ([0.7, 0.1, 0.2], 1.0),
    ([7473, 12000, 0.125, 3], 2.0),
    ([1e-6, 1, 1, 1, 2, 3, 5, 8, 13, 21], 2.0),
]


@pytest.mark.parametrize(("weights", "bound"), MIXTURES)
def test_no_set_is_ever_further_from_its_share_than_the_bound(
    weights: list[float], bound: float
) -> None:
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for group in range(4000):
        number, position = mixture.place(group)
        assert position == counts[number]  # none is left out, none comes twice
        counts[number] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - weight / sum(weights) * (group + 1)) <= bound + 1e-9
    assert [mixture.count(i, 4000) for i in range(len(weights))] == counts


def test_shares_stay_exact_after_a_billion_groups() -> None:
    mixture = Mixture([0.1, 0.7, 0.2])
    assert [mixture.count(i, 10**9) for i in range(3)] == [10**8, 7 * 10**8, 2 * 10**8]


def test_every_prompt_of_an_epoch_of_its_set_comes_exactly_once() -> None:
    order = an_order(a_set("a", 7, 3), a_set("b", 4, 1), a_set("c", 5, 0.5))
    given = ids(order, range(3000))
    for name, size in (("a", 7), ("b", 4), ("c", 5)):
        own = [i for i in given if i.startswith(name)]
        epochs = [own[start : start + size] for start in range(0, len(own) - size, size)]
        assert all(set(epoch) == {f"{name}:{i}" for i in range(size)} for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5  # in another order each time


def test_a_group_has_the_same_prompt_whatever_was_asked_before() -> None:
    """As a resumed run and groups that are sampled again ask."""
    sets = a_set("a", 7, 3), a_set("b", 4, 1)
    expected = ids(an_order(*sets), range(500))
    groups = list(range(500))
    random.Random(0).shuffle(groups)
    order = an_order(*sets)
    assert {group: order.at(group).id for group in groups} == dict(enumerate(expected))
    assert ids(an_order(*sets, seed=4), range(500)) != expected


def test_two_sets_of_one_length_are_shuffled_differently() -> None:
    given = ids(an_order(a_set("a", 9), a_set("b", 9)), range(18))
    own = [[i.split(":")[1] for i in given if i.startswith(name)] for name in "ab"]
    assert own[0] != own[1]


def test_unshuffled_sets_come_as_in_their_files_each_at_its_own_pace() -> None:
    order = an_order(a_set("a", 2, 2), a_set("b", 2, 1), shuffle=False)
    assert ids(order, range(6)) == ["a:0", "b:0", "a:1", "a:0", "b:1", "a:1"]


def test_it_is_told_how_often_each_set_has_been_gone_through() -> None:
    order = an_order(a_set("a", 6, 3), a_set("b", 4, 1))
    assert order.epochs(8) == {"a": 1.0, "b": 0.5}
    assert order.epochs(0) == {"a": 0.0, "b": 0.0}


def test_distinct_prompts_are_the_first_of_the_order_without_repetitions() -> None:
    order = an_order(a_set("a", 2, 3), a_set("b", 9, 1), shuffle=False)
    assert [p.id for p in order.distinct(5)] == ["a:0", "a:1", "b:0"]
    alone = an_order(a_set("a", 4))
    assert Counter(p.id for p in alone.distinct(99)) == Counter(p.id for p in alone.prompts)


def test_the_record_tells_other_prompts_of_the_same_number() -> None:
    before = an_order(a_set("a", 3)).record
    assert before == an_order(a_set("a", 3)).record
    assert before == {"a": {"num_prompts": 3, "fingerprint": before["a"]["fingerprint"]}}
    changed = a_set("a", 3)
    reordered = PromptSet(name="a", prompts=changed.prompts[::-1])
    assert an_order(reordered).record["a"]["fingerprint"] != before["a"]["fingerprint"]


def test_the_ledger_finds_a_group_of_a_mixture_that_had_another_sets_prompt() -> None:
    order = an_order(a_set("a", 3, 3), a_set("b", 2, 1))

    def problems(*prompts: str) -> tuple[str, ...]:
        entries = [Entry(step=1, group=g, prompt=prompt) for g, prompt in enumerate(prompts)]
        return audited(entries, None, window=1, planned=lambda g: order.at(g).id).problems

    right = ids(order, range(8))
    assert problems(*right) == ()
    swapped = [right[0], right[2], right[1], *right[3:]]
    assert problems(*swapped) == ("with another prompt than planned: 1, 2",)
