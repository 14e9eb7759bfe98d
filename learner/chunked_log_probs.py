"""Log-probabilities and entropy over a vocabulary, some tokens at a time, forward and backward.

What a chunk computes is forgotten and computed again in the backward pass, in place: two arrays of
[chunk, V] exist at once, whatever N is. The gradient of the weights is summed in float32: a sum in
bfloat16 that grows over 64 chunks is 1 % off, over 256 2 %, and a single product 0.24 %. That takes
6 bytes a weight for the time of the backward pass (the sum, and a chunk's product in bfloat16),
where the weights are of bfloat16. Refuses to know whose weights these are.
Legend: N tokens, n of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMaths:
    """What a chunk makes of its logits [n, V], which both may overwrite.

    sums: logits, targets, temperature -> log-probabilities, entropy, logsumexp, each [n] float32.
    gradient: logits, targets, entropy, logsumexp, the gradients of log-probabilities and entropy,
    temperature -> the gradient of the logits, in their type.
    """

    sums: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, H] -> [n, V] in float32."""
    logits = functional.linear(hidden.to(weight.dtype), weight, bias).float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    maths: LogitMaths,
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], targets [N] -> log-probabilities [N], entropy [N]."""
    found: tuple[Tensor, Tensor] = _Chunked.apply(
        hidden, weight, bias, targets, temperature, chunk_tokens, maths
    )
    return found


class _Chunked(torch.autograd.Function):
    """Both products of a chunk; what lies between them is its LogitMaths."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        maths: LogitMaths,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            maths.sums(functional.linear(h.to(weight.dtype), weight, bias), t, temperature)
            for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        ]
        chosen, entropy, log_total = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_total)
        ctx.temperature, ctx.chunk_tokens, ctx.maths = temperature, chunk_tokens, maths
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *of_tokens = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = _zeros(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else _zeros(bias)
        for start in range(0, len(hidden), ctx.chunk_tokens):
            here = slice(start, start + ctx.chunk_tokens)
            grad = ctx.maths.gradient(
                functional.linear(hidden[here].to(weight.dtype), weight, bias),
                *(values[here] for values in (*of_tokens, *gradients)),
                ctx.temperature,
            )
            grad_hidden[here] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[here].to(weight.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=grad_bias.dtype)
            del grad  # before the next chunk makes its own
        grads = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return grad_hidden, *grads, None, None, None, None


def _zeros(weight: Tensor) -> Tensor:
    """To sum a gradient in: of float32 at least."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without an array for the product where all are of one type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _sums(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """From d, a logit less the largest, and Z = sum exp(d).

    A log-probability is d - log Z; the entropy is log Z - sum(exp(d) d) / Z, where neither term is
    negative, so that nothing cancels.
    """
    logits = _tempered(logits, temperature)
    largest = logits.amax(-1)
    below = logits.sub_(largest[:, None])
    chosen = below.gather(-1, targets[:, None]).squeeze(-1)
    parts = below.exp()
    total = parts.sum(-1)
    log_total = total.log()
    entropy = log_total - parts.mul_(below).sum(-1) / total
    return chosen - log_total, entropy, largest + log_total


def _gradient(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    log_total: Tensor,
    grad_chosen: Tensor,
    grad_entropy: Tensor,
    temperature: float,
) -> Tensor:
    """With p the distribution, l its logarithm and S its entropy.

    (onehot - p) is the gradient of a log-probability and -p (l + S) that of the entropy, both over
    the temperature.
    """
    of_chosen, of_entropy = grad_chosen / temperature, grad_entropy / temperature
    logs = _tempered(logits, temperature).sub_(log_total[:, None])
    p = logs.exp()
    constant = -of_chosen - of_entropy * entropy
    grad = torch.addcmul(constant[:, None], logs, -of_entropy[:, None], out=logs).mul_(p)
    return grad.scatter_add_(-1, targets[:, None], of_chosen[:, None]).to(logits.dtype)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """In float32, in the place of logits that are."""
    return logits.float() if temperature == 1 else logits.float().div_(temperature)


EAGER = LogitMaths(sums=_sums, gradient=_gradient)
