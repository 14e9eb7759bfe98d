"""Attention over rows that lie behind one another in one line: each row sees itself alone.

Torch's causal kernel runs once for each row, so that no mask of [tokens x tokens] exists and no
work is spent on pairs of tokens that do not see each other. Registered with transformers, whose
models hand the rows' lengths down to it. Refuses to know models and rows' contents.
Legend: L tokens of the line, H heads, K key-value heads, D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from grpo.errors import UserError
from learner.sequence_parallel import SequenceGroup

ROW_ATTENTION = "covey_rows"
ROW_LENGTHS = "row_lengths"  # the argument of a model's forward pass that says where rows end
SEQUENCE_GROUP = "sequence_group"  # the argument that says which ranks share the line
# What some models add to attention, and this one does not compute.
_EXTRAS = ("softcap", "s_aux", "head_mask", "position_bias")


def row_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, L, D], of this rank's tokens
    key: Tensor,  # [1, K, L, D]
    value: Tensor,  # [1, K, L, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_lengths: tuple[int, ...] | None = None,  # None: a line is one row
    sequence_group: SequenceGroup | None = None,  # None: this rank holds the whole line
    **others: object,
) -> tuple[Tensor, None]:
    """[1, L, H, D], and no attention weights."""
    if dropout:
        raise UserError(
            f"{type(module).__name__} drops attention out, which is not the policy that sampled: "
            "set its dropout to 0"
        )
    extra = next((name for name in _EXTRAS if others.get(name) is not None), None)
    if extra is not None:
        raise UserError(
            f"{type(module).__name__} attends with {extra}, which torch's kernel cannot: set "
            "learner.attn_implementation: eager"
        )
    # A model that does not pass lengths on is told apart by `refuse_unpackable`.
    lengths = (query.shape[2],) if row_lengths is None else row_lengths
    inputs: tuple[Tensor, ...] = (query, key, value)
    if sequence_group is not None:
        inputs = tuple(sequence_group.whole_line(part, sum(lengths)) for part in inputs)
    parts = [part.split(lengths, dim=2) for part in inputs]
    rows = [
        _causal(q, k, v, scaling=scaling, window=sliding_window)
        for q, k, v in zip(*parts, strict=True)
    ]
    found = torch.cat(rows, dim=2)
    if sequence_group is not None:
        found = sequence_group.own_tokens(found)
    return found.transpose(1, 2), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
) -> Tensor:
    """One row; with a window each token sees the last `window` of them, itself included."""
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        place = torch.arange(length, device=query.device)
        behind = place[:, None] - place
        mask = (behind >= 0) & (behind < window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


AttentionInterface.register(ROW_ATTENTION, row_attention)
