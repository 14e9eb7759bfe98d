"""Memory of log-probabilities over a large vocabulary: the learner's ways against the plain one.

    python -m benchmarks.log_prob_memory                   2,048 tokens, 152k words
    python -m benchmarks.log_prob_memory --tokens 8192 --ways plain_forward chunked fused

    plain           log_softmax of all logits: 23 GiB at 8,192 tokens
    plain_forward   a part of it, and a bound where it does not fit: the log-probabilities alone,
                    with nothing kept for a backward pass
    chunked, fused  learner.fused_log_probs: false and true

Each way runs in a process of its own, forward and backward with entropy, and reports the peak above
what it held before. Times are of the process's CPU where there is no GPU, without compiling. All
must give the same loss and gradient. Knows nothing of layers below the output layer: what those
need is the same on all sides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.policy import LogProbHead

WAYS = ("plain", "plain_forward", "chunked", "fused")
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
    loss: float | None  # None: not computed
    gradient_norm: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the peak and the time of each way, and the ratios."""
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
        print(f"  {way:13} {result.peak_bytes / GIB:7.2f} GiB  {result.seconds:6.2f} s", end="")
        print("" if result.loss is None else f"  loss {result.loss:.6f}", end="")
        print("" if result.loss is None else f"  gradient {result.gradient_norm:.6f}")
    ours = {way: found[way] for way in ("chunked", "fused") if way in found}
    for way, result in ours.items():
        for plain in ("plain", "plain_forward"):
            if plain in found:
                memory = found[plain].peak_bytes / result.peak_bytes
                print(f"  {plain} / {way}: memory {memory:.1f}", end="")
                seconds = found[plain].seconds / result.seconds
                print(f", time {seconds:.2f}" if plain == "plain" else " or more")
    complete = [result for result in found.values() if result.loss is not None]
    for result in complete:
        torch.testing.assert_close(result.loss, complete[0].loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            result.gradient_norm, complete[0].gradient_norm, rtol=1e-4, atol=1e-6
        )


def _in_own_process(case: Case) -> Found:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_measured, (case,))
        pool.close()  # else it is killed, with what it would clean up
        pool.join()
        return found


def _measured(case: Case) -> Found:
    torch.manual_seed(0)
    layer = nn.Linear(case.hidden, case.vocabulary, bias=False, device=case.device)
    hidden = torch.randn(case.tokens, case.hidden, device=case.device, requires_grad=True)
    targets = torch.randint(case.vocabulary, (case.tokens,), device=case.device)
    head = LogProbHead(layer, temperature=1.0, is_fused=case.way == "fused")
    head.prepare(torch.device(case.device))
    before = _held(case.device)
    clock = time.perf_counter if case.device == "cuda" else time.process_time
    started = clock()
    loss = None
    if case.way == "plain_forward":
        with torch.no_grad():
            functional.log_softmax(layer(hidden), -1).gather(-1, targets[:, None])
    else:
        way = partial(_plain, layer) if case.way == "plain" else partial(head, with_entropy=True)
        log_probs, entropy = way(hidden=hidden, targets=targets)
        loss = -(log_probs + 0.01 * entropy).mean()
        torch.autograd.backward(loss)
    peak_bytes = _peak(case.device) - before
    return Found(
        peak_bytes=peak_bytes,
        seconds=clock() - started,
        loss=None if loss is None else loss.item(),
        gradient_norm=None if hidden.grad is None else hidden.grad.norm().item(),
    )


def _plain(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = functional.log_softmax(layer(hidden), -1)
    chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def _held(device: str) -> int:
    """Bytes held now; a peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return _peak(device)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest so far (proc(5))
    return _peak(device)


def _peak(device: str) -> int:
    """Most bytes held at once since `_held`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    (largest,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(largest) * KIB


if __name__ == "__main__":
    main()
