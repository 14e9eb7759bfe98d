"""Pieces of parameters: cut one way, put together another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo.errors import Fatal
from learner.shards import Piece, copied, restore, whole_pieces


def stepped(values: Sequence[float]) -> tuple[torch.optim.AdamW, nn.Parameter]:
    """An optimiser after one step on a parameter of these values; gradients are the values."""
    weight = nn.Parameter(torch.tensor(values))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = weight.detach().clone()
    optimizer.step()
    return optimizer, weight


def piece(flat: Tensor, start: int, offset: int, count: int) -> Piece:
    return Piece(name="w", start=start, num_elements=count, flat=flat, offset=offset)


def saved(folder: Path, *ranks: tuple[torch.optim.AdamW, list[Piece]]) -> list[Path]:
    files = [folder / f"rank_{rank}.safetensors" for rank in range(len(ranks))]
    for file, (optimizer, pieces) in zip(files, ranks, strict=True):
        save_file(copied(pieces, optimizer), file)
    return files


def test_two_uneven_pieces_with_padding_make_the_whole(tmp_path: Path) -> None:
    whole, weight = stepped([1.0, 2.0, 3.0, 4.0, 5.0])
    # Rank 0 holds elements 0 to 2 behind one of padding, rank 1 the elements 3 and 4.
    first, flat_0 = stepped([9.0, 1.0, 2.0, 3.0])
    second, flat_1 = stepped([4.0, 5.0])
    files = saved(tmp_path, (first, [piece(flat_0, 0, 1, 3)]), (second, [piece(flat_1, 3, 0, 2)]))
    target = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([target])
    restore(whole_pieces([("w", target)]), optimizer, files)
    assert torch.equal(target, weight)
    expected = whole.state[weight]
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[target][kind], expected[kind])


def test_a_copy_does_not_change_when_training_goes_on() -> None:
    optimizer, weight = stepped([1.0, 2.0])
    tensors = copied(whole_pieces([("w", weight)]), optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.step()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert before["step:0:w"].item() == 1.0


def test_elements_that_no_file_holds_are_missed(tmp_path: Path) -> None:
    optimizer, flat = stepped([1.0, 2.0])
    files = saved(tmp_path, (optimizer, [piece(flat, 0, 0, 2)]))
    target = nn.Parameter(torch.zeros(3))
    with pytest.raises(Fatal, match=r"holds 2 of 3 elements of .* of w"):
        restore(whole_pieces([("w", target)]), torch.optim.AdamW([target]), files)
    with pytest.raises(Fatal, match="does not hold v: it was saved for another model"):
        restore(whole_pieces([("v", target)]), torch.optim.AdamW([target]), files)
