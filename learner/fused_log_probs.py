"""The maths of a chunk's logits, compiled into one kernel forward and one backward.

torch.compile makes Triton of it on a GPU and C++ on a CPU. Forward it reads the logits twice and
writes none, backward it reads them once and writes the gradient in their place. One array of
[chunk, V] exists, in the type of the weights. Refuses to know where logits come from.
Legend: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._dynamo.exc import TorchDynamoException

from grpo.errors import UserError
from learner.chunked_log_probs import EAGER, LogitMaths, chunked_log_probs

T = TypeVar("T")
# deterministic: kernels that are chosen by timing them may sum in another order in the next run.
# compile_threads: two kernels are not worth processes that import torch and stay.
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "deterministic": True,
    "compile_threads": 1,
}


def _sums(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the eager one, without changing the logits."""
    tempered = logits.float() / temperature
    largest = tempered.amax(-1)
    below = tempered - largest[:, None]
    parts = below.exp()
    total = parts.sum(-1)
    log_total = total.log()
    entropy = log_total - (parts * below).sum(-1) / total
    chosen = tempered.gather(-1, targets[:, None]).squeeze(-1) - largest
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
    """As the eager one; the comparison in place of a scatter keeps it one kernel."""
    logs = logits.float() / temperature - log_total[:, None]
    words = torch.arange(logits.shape[-1], device=logits.device)
    of_chosen = torch.where(words == targets[:, None], grad_chosen[:, None], 0.0)
    slope = grad_chosen[:, None] + grad_entropy[:, None] * (logs + entropy[:, None])
    return logits.copy_((of_chosen - logs.exp() * slope) / temperature)


def _for_any_length(maths: Callable[..., T], eager: Callable[..., T]) -> Callable[..., T]:
    """Compiled once for every n and this V; the compiler takes an n of 0 or 1 for a constant."""
    compiled = torch.compile(maths, fullgraph=True, options=OPTIONS)

    def run(logits: Tensor, *others: Tensor | float) -> T:
        if len(logits) < 2:
            return eager(logits, *others)
        # A gradient may be one number that stands for all: strides are compiled in, too.
        of_tokens = [o.contiguous() if isinstance(o, Tensor) else o for o in others]
        for tensor in (logits, *of_tokens):
            if isinstance(tensor, Tensor):
                mark_dynamic(tensor, 0)
        return compiled(logits, *of_tokens)

    return run


@cache
def fused() -> LogitMaths:
    """One for all heads of a process; nothing is loaded or compiled before the first call."""
    return LogitMaths(
        sums=_for_any_length(_sums, EAGER.sums), gradient=_for_any_length(_gradient, EAGER.gradient)
    )


def compile_now(
    *,
    vocabulary: int,
    chunk_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    temperature: float,
) -> None:
    """Compile by running a full chunk: the code must not depend on which length comes first."""
    hidden = torch.zeros(chunk_tokens, 1, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(vocabulary, 1, dtype=dtype, device=device)
    targets = torch.zeros(chunk_tokens, dtype=torch.long, device=device)
    try:
        log_probs, entropy = chunked_log_probs(
            hidden,
            weight,
            None,
            targets,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            maths=fused(),
        )
        torch.autograd.backward((log_probs + entropy).sum())
    except TorchDynamoException as error:  # of every failure on the way to a kernel
        lines = str(error).splitlines()
        said = next((line for line in lines if "error:" in line), lines[0])
        raise UserError(
            f"the output layer cannot be compiled for {device}: {said.strip()}; expected a "
            "compiler with the headers of this Python. Install what is missing, or set "
            "learner.fused_log_probs: false"
        ) from error
