"""Rows of token ids of different lengths: which go into one forward pass, and their padding.

Knows no model. Shapes: B rows, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def passes(lengths: Sequence[int], *, at_most: int) -> Iterator[list[int]]:
    """Places of rows of similar length, as many as fit into `at_most` tokens with their padding.

    Lengths 3, 9, 4 and at_most 9: [1], then [2, 0].
    """
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if part and (len(part) + 1) * lengths[part[0]] > at_most:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, L], padded on the right where no causal state sees it."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def device_of(name: str) -> torch.device:
    """`auto`: of a Ray actor these are the GPUs set aside for it: none, unless asked for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
