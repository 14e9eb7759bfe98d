"""In which order the prompts of data sets are given out: a pure function of seed and group id.

Several sets are mixed by their weights, exactly and without chance. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from grpo.errors import UserError
from grpo.types import Prompt
from orchestration.mixture import Mixture
from orchestration.prompts import PromptSet

ORDERS_KEPT = 2  # near the end of an epoch, groups of both are asked for


class PromptOrder:
    """Each set goes through its prompts, every one once an epoch of this set, without end.

    Nothing needs to be saved: a resumed run asks for the same group ids and sees the same data.
    """

    def __init__(self, sets: Sequence[PromptSet], *, seed: int, shuffle: bool) -> None:
        self._sets = sets
        self._mixture = Mixture([found.weight for found in sets])
        self._epochs = [
            _Epochs(found.prompts, seed=seed, shuffle=shuffle, number=number)
            for number, found in enumerate(sets)
        ]

    @property
    def prompts(self) -> Iterator[Prompt]:
        """Each once, set by set."""
        return (prompt for found in self._sets for prompt in found.prompts)

    def at(self, group: int) -> Prompt:
        """The prompt of this group."""
        number, position = self._mixture.place(group)
        return self._epochs[number].at(position)

    def distinct(self, num_groups: int) -> list[Prompt]:
        """The prompts of the first groups, each once."""
        return list({prompt.id: prompt for prompt in map(self.at, range(num_groups))}.values())

    def epochs(self, num_groups: int) -> Mapping[str, float]:
        """How often the first groups went through each set: 1.5 is once and a half."""
        return {
            found.name: self._mixture.count(number, num_groups) / len(found.prompts)
            for number, found in enumerate(self._sets)
        }

    @cached_property
    def record(self) -> Mapping[str, JsonValue]:
        """What a checkpoint notes of the data, so that a resumed run can tell other ones."""
        return {
            found.name: {"num_prompts": len(found.prompts), "fingerprint": found.fingerprint}
            for found in self._sets
        }


class _Epochs:
    """The prompts of one set, every one once an epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, number: int) -> None:
        """`number` of the set: two of one length are shuffled differently."""
        self._prompts = prompts
        self._seed = (seed, number)
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=ORDERS_KEPT)(self._drawn)

    def at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[self._order(epoch)[place] if self._shuffle else place]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        seed, number = self._seed
        return np.random.default_rng([seed, epoch, number]).permutation(len(self._prompts))


def easy_to_hard(
    prompts: Sequence[Prompt], *, column: str, values: Sequence[str]
) -> tuple[Prompt, ...]:
    """Prompts by this column: by its place in `values`, or, without these, in rising order.

    Equal ones stay as in the file. Curriculum of G2RPO-A (arXiv:2508.13023 section 4.3).
    """
    ranks = [_rank(prompt, column, values) for prompt in prompts]
    if len({isinstance(rank, str) for rank in ranks}) > 1:
        raise UserError(
            f"data.curriculum: column {column!r} holds numbers and text; expected one kind, or "
            "name its values from easy to hard under data.curriculum.values"
        )
    order = sorted(range(len(prompts)), key=ranks.__getitem__)  # of one kind
    return tuple(prompts[place] for place in order)


def _rank(prompt: Prompt, column: str, values: Sequence[str]) -> float | str:
    if column not in prompt.columns:
        found = ", ".join(prompt.columns)
        raise UserError(
            f"{prompt.id}: no column {column!r}, which data.curriculum names; found: {found}"
        )
    value = prompt.columns[column]
    if values:
        if str(value) not in values:
            raise UserError(
                f"{prompt.id}: {column!r} is {value!r}, which is none of data.curriculum.values "
                f"({', '.join(values)}): add it where it belongs"
            )
        return float(values.index(str(value)))
    if isinstance(value, str | int | float):
        return value
    raise UserError(f"{prompt.id}: {column!r} is {value!r}; expected a number or text to order by")
