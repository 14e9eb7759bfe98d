"""In which order the prompts of a data set are given out: a pure function of seed and group id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
