"""In which order the prompts of a data set are given out: a pure function of seed and group id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo.errors import UserError
from grpo.types import Prompt


class PromptOrder:
    """Every prompt once an epoch, without end; group g gets prompt g of this order.

    Nothing needs to be saved: a resumed run asks for the same group ids and sees the same data.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1  # of the order drawn last
        self._order: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self._prompts)

    def at(self, group: int) -> Prompt:
        """The prompt of this group."""
        epoch, position = divmod(group, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._drawn(epoch)
        return self._prompts[self._order[position]]

    def _drawn(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._prompts))
        generator = np.random.default_rng([self._seed, epoch])
        return [int(place) for place in generator.permutation(len(self._prompts))]


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
