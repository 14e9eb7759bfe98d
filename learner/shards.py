"""Master weights and optimiser state in pieces that any number of ranks can read.

A piece is a run of elements of one parameter: `exp_avg:4096:model.norm.weight` begins at element
4096. Every rank writes the pieces that it holds to a file of its own and at load copies what
overlaps with them out of all files, so that ranks and ZeRO stage may differ between the two.
Refuses to know who holds which piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from grpo.errors import Fatal

MASTER = "master"  # the kind of a piece; all other kinds are keys of the optimiser's state


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Elements of a parameter that this rank optimises, within a tensor of its optimiser."""

    name: str  # of the parameter
    start: int  # first element, within the flattened parameter
    num_elements: int
    flat: Tensor  # what the optimiser steps on; may hold other parameters and padding, too
    offset: int  # of the first element within `flat`

    def view(self, tensor: Tensor) -> Tensor:
        """These elements of `flat`, or of a tensor of its shape in the optimiser's state."""
        assert tensor.is_contiguous(), f"{self.name}: a view of a copy would be written in vain"
        return tensor.detach().view(-1)[self.offset : self.offset + self.num_elements]


def whole_pieces(parameters: Iterable[tuple[str, Tensor]]) -> list[Piece]:
    """Of an optimiser that steps on whole parameters, by name."""
    return [
        Piece(name=name, start=0, num_elements=flat.numel(), flat=flat, offset=0)
        for name, flat in parameters
    ]


def copied(pieces: Sequence[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every piece by kind, start and name; on CPU, and no later step changes it."""
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        state = optimizer.state.get(piece.flat, {})  # empty before the first step
        for kind, value in {MASTER: piece.flat, **state}.items():
            part = piece.view(value) if value.shape == piece.flat.shape else value
            key = f"{kind}:{piece.start}:{piece.name}"
            tensors[key] = part.detach().to("cpu", copy=True)
    return tensors


def restore(
    pieces: Sequence[Piece], optimizer: torch.optim.Optimizer, files: Sequence[Path]
) -> None:
    """Give every piece and its optimiser state the elements that `copied` took, on any ranks."""
    with ExitStack() as open_files:
        saved = _Saved([open_files.enter_context(_opened(file)) for file in files])
        for piece in pieces:
            kinds = saved.kinds(piece.name)
            if MASTER not in kinds:
                raise Fatal(
                    f"the checkpoint does not hold {piece.name}: it was saved for another model"
                )
            for kind in kinds:
                saved.read(kind, piece, _target(kind, piece, optimizer, saved))


def _target(kind: str, piece: Piece, optimizer: torch.optim.Optimizer, saved: _Saved) -> Tensor:
    """The tensor to fill; an optimiser that has not stepped yet has none for its state."""
    if kind == MASTER:
        return piece.flat
    state = optimizer.state[piece.flat]
    if kind not in state:
        is_number = saved.is_number(kind, piece.name)
        state[kind] = torch.zeros(()) if is_number else torch.zeros_like(piece.flat)
    target: Tensor = state[kind]
    return target


class _Saved:
    """What the files of all ranks hold of each parameter."""

    def __init__(self, files: Sequence[Any]) -> None:
        # By name and kind: first element, number of elements, slice to read from. A number that
        # belongs to the whole parameter (Adam's step) has no shape.
        self._found: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118  # a safetensors file, not a dict
                kind, start, name = key.split(":", 2)
                of_name = self._found.setdefault(name, {})
                of_name.setdefault(kind, []).append((int(start), file.get_slice(key)))

    def kinds(self, name: str) -> list[str]:
        return list(self._found[name]) if name in self._found else []

    def is_number(self, kind: str, name: str) -> bool:
        return not self._found[name][kind][0][1].get_shape()

    @torch.no_grad()
    def read(self, kind: str, piece: Piece, target: Tensor) -> None:
        """Copy all elements of the piece; Fatal unless they are all there."""
        parts = self._found[piece.name][kind]
        if self.is_number(kind, piece.name):
            target.copy_(parts[0][1][...])
            return
        view = piece.view(target)
        end, num_read = piece.start + piece.num_elements, 0
        for start, part in parts:
            (length,) = part.get_shape()
            low, high = max(start, piece.start), min(start + length, end)
            if low < high:
                view[low - piece.start : high - piece.start] = part[low - start : high - start]
                num_read += high - low
        if num_read != piece.num_elements:
            raise Fatal(
                f"the checkpoint holds {num_read} of {piece.num_elements} elements of {kind} of "
                f"{piece.name}: it was saved for another model"
            )


def _opened(file: Path) -> Any:
    return safe_open(file, "pt")
