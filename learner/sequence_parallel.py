"""One line of tokens on several ranks (DeepSpeed Ulysses, arXiv:2309.14509).

Every rank of a sequence group holds an Nth of a line's tokens in all layers. For attention they
exchange tokens for heads and back, so that each computes an Nth of the heads over the whole line.
Each rank's gradient is the part that came through its tokens: the sum over all ranks is the
gradient, as without sequence groups. Refuses to know models and rows.
Legend: N ranks of a group, L tokens of the line, l of this rank, H heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

Group = torch.distributed.ProcessGroup


class SequenceGroup:
    """The ranks that share every line; all of them call each method together."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.size = torch.distributed.get_world_size(group)
        self._place = torch.distributed.get_rank(group)

    def span(self, num_tokens: int) -> tuple[int, int]:
        """[start, end) of this rank's tokens. 7 tokens on 3 ranks: 0 to 3, 3 to 5, 5 to 7."""
        end = sum(self._shares(num_tokens)[: self._place + 1])
        return end - self._shares(num_tokens)[self._place], end

    def whole_line(self, part: Tensor, num_tokens: int) -> Tensor:
        """[1, H, l, D] -> [1, H / N, L, D]; fewer heads than ranks are repeated before."""
        if part.shape[1] < self.size:
            part = part.repeat_interleave(self.size // part.shape[1], dim=1)
        heads, size = part.shape[1] // self.size, part.shape[3]
        sent = [heads * part.shape[2] * size] * self.size
        got = [heads * share * size for share in self._shares(num_tokens)]
        flat = _Exchange.apply(part.flatten(), sent, got, self._group)
        return torch.cat([of.view(1, heads, -1, size) for of in flat.split(got)], dim=2)

    def own_tokens(self, line: Tensor) -> Tensor:
        """[1, H / N, L, D] -> [1, H, l, D]"""
        _, heads, num_tokens, size = line.shape
        shares = self._shares(num_tokens)
        flat = torch.cat([part.flatten() for part in line.split(shares, dim=2)])
        sent = [heads * share * size for share in shares]
        got = [heads * shares[self._place] * size] * self.size
        found: Tensor = _Exchange.apply(flat, sent, got, self._group)
        return found.view(1, self.size * heads, -1, size)

    def gathered(self, part: Tensor, is_mine: Tensor) -> Tensor:
        """[n, ...] and which of N places they are -> [N, ...] of all ranks."""
        found: Tensor = _Gather.apply(part, is_mine, self._group)
        return found

    def _shares(self, num_tokens: int) -> list[int]:
        """Tokens of each rank, one more on the first ones where they cannot be equal."""
        share, rest = divmod(num_tokens, self.size)
        return [share + (place < rest) for place in range(self.size)]


def joined_groups(size: int, *, timeout: timedelta) -> tuple[SequenceGroup, Group]:
    """This rank's sequence group, and the ranks that hold the same place in theirs.

    Six ranks in groups of 2: sequence groups 01 23 45, ranks of the same place 024 135. On all
    ranks together, as every group is made on every rank.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    sequences = [list(range(first, first + size)) for first in range(0, world, size)]
    places = [list(range(place, world, size)) for place in range(size)]
    made = [(ranks, torch.distributed.new_group(ranks, timeout)) for ranks in sequences + places]
    sequence, same_place = (group for ranks, group in made if rank in ranks)
    return SequenceGroup(sequence), same_place


class _Exchange(torch.autograd.Function):
    """`sent` elements to each rank for `got` elements of each; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, sent: Sequence[int], got: Sequence[int], group: Group
    ) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _exchanged(flat, sent, got, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.got, ctx.sent, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    """What every rank has, on every rank; each computes the same with it, so none adds it up."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, is_mine: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(is_mine)
        whole = part.new_zeros(len(is_mine), *part.shape[1:])
        whole[is_mine] = part
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (is_mine,) = ctx.saved_tensors
        return gradient[is_mine], None, None


def _exchanged(flat: Tensor, sent: Sequence[int], got: Sequence[int], group: Group) -> Tensor:
    found = flat.new_empty(sum(got))
    torch.distributed.all_to_all_single(
        found, flat.contiguous(), list(got), list(sent), group=group
    )
    return found
