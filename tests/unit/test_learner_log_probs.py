"""The output layer in chunks: values, gradients, and that nothing as large as [N, V] is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learner.chunked_log_probs import EAGER, chunked_log_probs
from learner.policy import LogProbHead

N, H, V = 23, 8, 50


def layer_and_inputs(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    layer = nn.Linear(H, V, bias=bias, dtype=dtype)
    hidden = torch.randn(N, H, dtype=dtype)
    return layer, hidden, torch.randint(V, (N,)), torch.randn(N), torch.randn(N)


def gradients(
    layer: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    of_log_probs: Tensor,
    of_entropy: Tensor,
    *,
    chunk_tokens: int,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropy and the gradients of a random combination of them."""
    head = LogProbHead(layer, temperature=temperature, is_fused=False)
    head.chunk_tokens = chunk_tokens
    hidden = hidden.clone().requires_grad_()
    log_probs, entropy = head(hidden, targets, True)
    wanted = [hidden, *layer.parameters()]
    loss = (log_probs * of_log_probs + entropy * of_entropy).sum()
    return (log_probs, entropy, *torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_neither_values_nor_gradients(
    chunk_tokens: int, temperature: float, bias: bool
) -> None:
    case = layer_and_inputs(bias=bias)
    whole = gradients(*case, chunk_tokens=N, temperature=temperature)
    chunked = gradients(*case, chunk_tokens=chunk_tokens, temperature=temperature)
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_a_bfloat16_layer_gets_gradients_of_its_own_type() -> None:
    case = layer_and_inputs(dtype=torch.bfloat16)
    whole, chunked = (gradients(*case, chunk_tokens=size) for size in (N, 4))
    assert [part.dtype for part in chunked] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("chunk_tokens", [8, 1])
def test_many_chunks_of_bfloat16_round_no_more_than_one(chunk_tokens: int) -> None:
    """A sum that is rounded at each of 512 chunks is several percent off."""
    torch.manual_seed(0)
    num_tokens = 512
    exact = nn.Linear(H, V)
    hidden, targets = torch.randn(num_tokens, H), torch.randint(V, (num_tokens,))
    slopes = torch.rand(num_tokens), torch.zeros(num_tokens)  # of one sign, so that the sum grows
    rounded = nn.Linear(H, V, dtype=torch.bfloat16)
    with torch.no_grad():
        for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours.copy_(theirs))
    low = hidden.bfloat16()
    expected = gradients(exact, low.float(), targets, *slopes, chunk_tokens=num_tokens)[3:]
    whole = gradients(rounded, low, targets, *slopes, chunk_tokens=num_tokens)[3:]
    chunked = gradients(rounded, low, targets, *slopes, chunk_tokens=chunk_tokens)[3:]
    for ours, plain, right in zip(chunked, whole, expected, strict=True):
        of_plain = (plain.float() - right).norm() / right.norm()
        assert (ours.float() - right).norm() / right.norm() < max(1.2 * of_plain, 0.004)


def test_a_frozen_layer_costs_no_gradient_of_its_weights() -> None:
    layer, hidden, targets, *_ = layer_and_inputs()
    layer.weight.requires_grad_(False)
    head = LogProbHead(layer, temperature=1.0, is_fused=False)
    head.chunk_tokens = 5
    log_probs, _ = head(hidden.requires_grad_(), targets, True)
    log_probs.sum().backward()
    assert layer.weight.grad is None
    assert hidden.grad is not None


class LargestTensor(TorchDispatchMode):
    """Watches the size of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if isinstance(found, Tensor):
                self.elements = max(self.elements, found.numel())
        return result


def test_no_array_of_all_tokens_and_all_words_is_ever_made() -> None:
    case = layer_and_inputs()
    with LargestTensor() as chunked:
        gradients(*case, chunk_tokens=10)
    assert chunked.elements == 10 * V
    with LargestTensor() as whole:
        gradients(*case, chunk_tokens=N)
    assert whole.elements == N * V


def test_only_what_the_loss_needs_is_kept_for_the_backward_pass() -> None:
    layer, hidden, targets, *_ = layer_and_inputs()
    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        chunked_log_probs(
            hidden.requires_grad_(),
            layer.weight,
            None,
            targets,
            temperature=1.0,
            chunk_tokens=5,
            maths=EAGER,
        )
    assert sum(kept) == N * H + V * H + 3 * N
