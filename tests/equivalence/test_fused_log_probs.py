"""The output layer compiled, against the same in eager chunks and against torch's own gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch._dynamo.utils import counters

from grpo.errors import UserError
from learner.config import LearnerConfig
from learner.policy import LogProbHead
from tests.equivalence.learner_processes import outcomes_of
from tests.unit.learner_cases import write_model

pytestmark = pytest.mark.slow

N, H, V = 23, 8, 50
WAYS = {"plain": (False, N), "eager": (False, 5), "fused": (True, 5)}


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    """What is compiled stays in a process, which holds eight kinds of one function."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def case(*, bias: bool, dtype: torch.dtype) -> tuple[nn.Embedding, nn.Linear, Tensor, Tensor]:
    """A table of hidden states and the output layer that shares its weights."""
    torch.manual_seed(0)
    embedding = nn.Embedding(V, H, dtype=dtype)
    layer = nn.Linear(H, V, bias=bias, dtype=dtype)
    layer.weight = embedding.weight
    return embedding, layer, torch.randint(V, (N,)), torch.randint(V, (N,))


def computed(
    way: str, *, temperature: float = 0.7, bias: bool = True, dtype: torch.dtype = torch.float32,
    with_entropy: bool = True, num_tokens: int = N,
) -> list[Tensor]:  # fmt: skip
    """Log-probabilities, entropy if asked for, and the gradients of a random sum of them."""
    embedding, layer, tokens, targets = case(bias=bias, dtype=dtype)
    head = LogProbHead(layer, temperature=temperature, is_fused=WAYS[way][0])
    head.chunk_tokens = WAYS[way][1]
    found = head(embedding(tokens[:num_tokens]).tanh(), targets[:num_tokens], with_entropy)
    weights = torch.randn(len(found), num_tokens)
    loss = sum((weight * part).sum() for weight, part in zip(weights, found, strict=True))
    assert isinstance(loss, Tensor)
    return [*found, *torch.autograd.grad(loss, list(layer.parameters()))]


@pytest.mark.parametrize(
    ("temperature", "bias", "with_entropy"),
    [(1.0, False, True), (0.7, True, True), (0.7, False, False)],
)
def test_fused_eager_and_plain_agree_in_values_and_gradients(
    temperature: float, bias: bool, with_entropy: bool
) -> None:
    plain, eager, fused = (
        computed(way, temperature=temperature, bias=bias, with_entropy=with_entropy) for way in WAYS
    )
    for expected, ours, compiled in zip(plain, eager, fused, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(compiled, expected, atol=2e-6, rtol=1e-5)


def test_in_bfloat16_only_the_gradients_are_rounded() -> None:
    plain, fused = (computed(way, dtype=torch.bfloat16) for way in ("plain", "fused"))
    assert [part.dtype for part in fused] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for ours, expected in zip(fused[:2], plain[:2], strict=True):  # of the same logits
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    for ours, expected in zip(fused[2:], plain[2:], strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), atol=0.05, rtol=0.05)


def test_many_lengths_are_compiled_once_for_each_direction() -> None:
    for num_tokens in (N, 22, 21, 19, 16, 11, 7, 4, 2, 1, 0):  # chunks of 5, 4, 3, 2, 1 and 0
        computed("fused", num_tokens=num_tokens)
    _, layer, tokens, targets = case(bias=False, dtype=torch.float32)
    hidden = nn.functional.embedding(tokens, layer.weight)
    head = LogProbHead(layer, temperature=0.7, is_fused=True)
    head(hidden, targets, True)[0].sum().backward()  # one gradient stands for those of all tokens
    assert counters["stats"]["unique_graphs"] == 2


def test_the_same_tokens_give_the_same_bits_when_they_are_compiled_anew() -> None:
    once = computed("fused")
    torch._dynamo.reset()
    computed("fused", num_tokens=7)
    for ours, theirs in zip(computed("fused"), once, strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_compile_ends_the_start_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        "echo 'error: Python.h: No such file' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(compiler),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    head = LogProbHead(nn.Linear(H, V), temperature=1.0, is_fused=True)
    with pytest.raises(UserError, match=r"Python.h: No such .* learner.fused_log_probs: false"):
        head.prepare(torch.device("cpu"))


def test_a_learner_on_two_ranks_of_zero_3_learns_the_same(tmp_path: Path) -> None:
    settings = {"ranks": 2, "zero_stage": 3, "learning_rate": 1e-3, "max_tokens_per_microbatch": 50}
    configs = {
        name: LearnerConfig.model_validate({**settings, "fused_log_probs": is_fused})
        for name, is_fused in (("eager", False), ("fused", True))
    }
    model = write_model(tmp_path / "model")
    for outcomes in outcomes_of(configs, ranks=2, model=model, folder=tmp_path):
        assert not any(outcome.error for outcome in outcomes.values())
        eager, fused = outcomes["eager"], outcomes["fused"]
        for metrics, others in zip(fused.metrics, eager.metrics, strict=True):
            assert metrics == pytest.approx(others, abs=1e-5)
        weights, expected = (load(o.image) if o.image else {} for o in (fused, eager))
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)
        assert fused.resumed_image == fused.image  # bit for bit
        assert len(fused.refusals) == 2
