"""Log-probabilities and entropy over a vocabulary, some tokens at a time, forward and backward.

What a chunk computes is forgotten and computed again in the backward pass, in place: two arrays of
[chunk, V] exist at once, whatever N is. Refuses to know whose weights these are.
Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, H] -> [n, V] in float32."""
    logits = functional.linear(hidden.to(weight.dtype), weight, bias).float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], targets [N] -> log-probabilities [N], entropy [N]."""
    found: tuple[Tensor, Tensor] = _Chunked.apply(
        hidden, weight, bias, targets, temperature, chunk_tokens
    )
    return found


class _Chunked(torch.autograd.Function):
    """The gradient by hand.

    With p the distribution, l its logarithm and S its entropy, the gradient with respect to the
    logits is (onehot - p) of a log-probability and -p (l + S) of the entropy, over the temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        chosen, entropy = [], []
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            logs = log_softmax(h, weight, bias, temperature)
            chosen.append(logs.gather(-1, t[:, None]).squeeze(-1))
            entropy.append(-logs.exp().mul_(logs).sum(-1))
        found = torch.cat(chosen), torch.cat(entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, found[1])
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return found

    @staticmethod
    def backward(ctx: Any, grad_chosen: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, len(hidden), ctx.chunk_tokens):
            here = slice(start, start + ctx.chunk_tokens)
            logs = log_softmax(hidden[here], weight, bias, ctx.temperature)
            grad = _logit_gradient(
                logs, targets[here], entropy[here], grad_chosen[here], grad_entropy[here]
            )
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[here] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[here].to(weight.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del logs, grad  # before the next chunk makes its own
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logit_gradient(
    logs: Tensor, targets: Tensor, entropy: Tensor, grad_chosen: Tensor, grad_entropy: Tensor
) -> Tensor:
    """[n, V] of the tempered logits, in the place of `logs`."""
    p = logs.exp()
    grad = logs.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_chosen[:, None])
    grad = grad.mul_(p).neg_()
    return grad.scatter_add_(-1, targets[:, None], grad_chosen[:, None])
