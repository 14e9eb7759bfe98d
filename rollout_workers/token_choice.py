"""How a token is drawn from logits: temperature, top-k, top-p, and one uniform number per token.

The numbers come in as arguments, so a row's choice does not depend on the rows beside it.
Legend: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Temperature 0 takes the likeliest token and reports its log-probability at temperature 1.

    Args:
        logits: [B, V] of any floating type.
        temperature: [B]; 0 is greedy.
        top_p: [B] in (0, 1]; 1 keeps everything.
        top_k: [B] int64; 0 keeps everything.
        uniform: [B] float64 in [0, 1).
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    limited = ~greedy & ((top_p < 1) | (top_k > 0))
    if bool(limited.any()):
        kept = _kept(scaled, top_p, top_k) | ~limited[:, None]
        scaled = scaled.masked_fill(~kept, -torch.inf)
    log_probs = scaled.log_softmax(-1)
    # Inverse of the cumulative distribution; float64, or the sum over a large V drifts.
    cumulative = log_probs.double().exp().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], scaled.argmax(-1, keepdim=True), drawn)
    return tokens[:, 0], log_probs.gather(-1, tokens)[:, 0]


def _kept(scaled: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[B, V] the k likeliest tokens, and of these the fewest whose probability reaches p."""
    ordered, order = scaled.sort(-1, descending=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    among_k = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probs = ordered.masked_fill(~among_k, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs  # probability of the likelier tokens
    among_p = (before < top_p[:, None]) | (rank == 0)
    return torch.zeros_like(among_k).scatter(-1, order, among_k & among_p)
