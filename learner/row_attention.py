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

ROW_ATTENTION = "covey_rows"
ROW_LENGTHS = "row_lengths"  # the argument of a model's forward pass that says where rows end
# What some models add to attention, and this one does not compute.
_EXTRAS = ("softcap", "s_aux", "head_mask", "position_bias")


def row_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, L, D]
    key: Tensor,  # [1, K, L, D]
    value: Tensor,  # [1, K, L, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_lengths: tuple[int, ...] | None = None,  # None: a line is one row
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
    parts = [part.split(lengths, dim=2) for part in (query, key, value)]
    found = [
        _causal(q, k, v, scaling=scaling, window=sliding_window)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None


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
