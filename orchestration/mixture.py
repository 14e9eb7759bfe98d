"""Which of several weighted sets a group belongs to: exact at every moment, and without chance.

The lightest sets are joined first, as in Huffman's code; a join deals its groups out to its two
sides in turn. Refuses to know what the sets hold.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction


class Mixture:
    """A pure function from the group id to a set and the position in it.

    Of the first n groups a set with the share p has p * n, never further off than 2: a join is off
    by 1/2 at most, and passes on the share of its own error that belongs to the side; two joins
    up, a side is less than half of all. With two sets that is 1/2, with three 1. A look-up takes
    a division for each join on its way, however large the id.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
        self.shares = tuple(float(weight / sum(exact)) for weight in exact)
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._root = _joined([int(weight * scale) for weight in exact])
        self._ways = dict(_ways(self._root, ()))

    def place(self, group: int) -> tuple[int, int]:
        """The number of the group's set, and how many earlier groups this set has had."""
        node, position = self._root, group
        while isinstance(node, _Join):
            before = node.count(position)
            is_first = node.count(position + 1) > before
            node, position = (node.first, before) if is_first else (node.second, position - before)
        return node, position

    def count(self, number: int, num_groups: int) -> int:
        """How many of the first `num_groups` are of this set."""
        for join, is_first in self._ways[number]:
            before = join.count(num_groups)
            num_groups = before if is_first else num_groups - before
        return num_groups


@dataclass(frozen=True, slots=True)
class _Join:
    """Deals out to two sides: sets by their number, or joins."""

    first: _Join | int  # the heavier one
    second: _Join | int
    first_weight: int
    weight: int  # of both

    def count(self, num_groups: int) -> int:
        """How many of the first `num_groups` of this join are the first side's: rounded."""
        return (2 * num_groups * self.first_weight + self.weight) // (2 * self.weight)


def _joined(weights: Sequence[int]) -> _Join | int:
    # The second entry tells equal weights apart: the earlier set is the one that begins.
    heap: list[tuple[int, int, _Join | int]] = [(w, -i, i) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    for number in range(len(weights), 2 * len(weights) - 1):
        light, _, second = heapq.heappop(heap)
        heavy, _, first = heapq.heappop(heap)
        join = _Join(first, second, heavy, light + heavy)
        heapq.heappush(heap, (join.weight, -number, join))
    return heap[0][2]


def _ways(
    node: _Join | int, above: tuple[tuple[_Join, bool], ...]
) -> Iterator[tuple[int, tuple[tuple[_Join, bool], ...]]]:
    """Of each set the joins from the root to it, and which side it is on."""
    if isinstance(node, int):
        yield node, above
    else:
        yield from _ways(node.first, (*above, (node, True)))
        yield from _ways(node.second, (*above, (node, False)))
