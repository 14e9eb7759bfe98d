"""Memory of log-probabilities over a large vocabulary: the learner's way against the plain one.

    python -m benchmarks.log_prob_memory                   2,048 tokens, 152k words
    python -m benchmarks.log_prob_memory --tokens 8192 --ways chunked    the plain one needs 23 GiB

Each way runs in a process of its own, forward and backward with entropy, and reports the peak above
what it held before. Times are of the process's CPU where there is no GPU. Both must give the same
loss and gradient. Knows nothing of layers below the output layer: what those need is the same on
both sides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.policy import LogProbHead

WAYS = ("plain", "chunked")
KIB, GIB = 2**10, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way at one size."""

    way: str
    tokens: int
    vocabulary: int
    hidden: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one way cost, and what it computed."""

    peak_bytes: int
    seconds: float
    loss: float
    gradient_norm: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the peak and the time of both ways, and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_prob_memory")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {name: value for name, value in vars(options).items() if name != "ways"}
    found = {way: _in_own_process(Case(way=way, device=device, **size)) for way in options.ways}
    print(
        f"{options.tokens} tokens x {options.vocabulary} words, hidden {options.hidden}, {device}"
    )
    for way, result in found.items():
        print(
            f"  {way:8} {result.peak_bytes / GIB:7.2f} GiB  {result.seconds:6.2f} s  "
            f"loss {result.loss:.6f}  gradient {result.gradient_norm:.6f}"
        )
    if len(found) < len(WAYS):
        return
    plain, chunked = (found[way] for way in WAYS)
    print(
        f"  plain / chunked: memory {plain.peak_bytes / chunked.peak_bytes:.1f}, "
        f"time {plain.seconds / chunked.seconds:.2f}"
    )
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked.gradient_norm, plain.gradient_norm, rtol=1e-4, atol=1e-6)


def _in_own_process(case: Case) -> Found:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (case,))


def _measured(case: Case) -> Found:
    torch.manual_seed(0)
    layer = nn.Linear(case.hidden, case.vocabulary, bias=False, device=case.device)
    hidden = torch.randn(case.tokens, case.hidden, device=case.device, requires_grad=True)
    targets = torch.randint(case.vocabulary, (case.tokens,), device=case.device)
    before = _peak(case.device)
    clock = time.perf_counter if case.device == "cuda" else time.process_time
    started = clock()
    log_probs, entropy = (_plain if case.way == "plain" else _chunked)(layer, hidden, targets)
    loss = -(log_probs + 0.01 * entropy).mean()
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    return Found(
        peak_bytes=_peak(case.device) - before,
        seconds=clock() - started,
        loss=loss.item(),
        gradient_norm=hidden.grad.norm().item(),
    )


def _plain(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = functional.log_softmax(layer(hidden), -1)
    chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def _chunked(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs, entropy = LogProbHead(layer, temperature=1.0)(hidden, targets, True)
    return log_probs, entropy


def _peak(device: str) -> int:
    """Most bytes held at once so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


if __name__ == "__main__":
    main()
