"""Attention row by row against transformers' own, with its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from grpo.errors import UserError
from learner.row_attention import ROW_ATTENTION, ROW_LENGTHS, row_attention

LENGTHS = (5, 1, 17, 9)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=4),
    "qwen2 with a window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
}


def hidden_and_gradient(model: PreTrainedModel, **how: object) -> tuple[Tensor, list[Tensor]]:
    total = sum(LENGTHS)
    tokens = torch.arange(total).mul(7).remainder(50)[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    hidden = model.get_decoder()(
        input_ids=tokens, position_ids=positions, use_cache=False, **how
    ).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    gradient = torch.autograd.grad(
        (hidden * weights).sum(), list(model.parameters()), allow_unused=True
    )
    return hidden, [part for part in gradient if part is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_masked_attention(name: str) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[name], attn_implementation=ROW_ATTENTION)
    hidden, gradient = hidden_and_gradient(model, **{ROW_LENGTHS: LENGTHS})
    model.set_attn_implementation("eager")
    expected, of_expected = hidden_and_gradient(model)
    torch.testing.assert_close(hidden, expected, atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(gradient, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_row_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    found, _ = row_attention(torch.nn.Identity(), query, key, value, None, row_lengths=LENGTHS)
    value[:, :, : LENGTHS[0]] += 100.0
    other, _ = row_attention(torch.nn.Identity(), query, key, value, None, row_lengths=LENGTHS)
    assert (found != other)[:, : LENGTHS[0]].any()
    assert torch.equal(found[:, LENGTHS[0] :], other[:, LENGTHS[0] :])


def test_without_lengths_each_line_is_a_row() -> None:
    query, key, value = (torch.randn(2, 2, 5, 8) for _ in range(3))
    both, _ = row_attention(torch.nn.Identity(), query, key, value, None)
    for line in range(2):
        parts = [part[line : line + 1] for part in (query, key, value)]
        alone, _ = row_attention(torch.nn.Identity(), *parts, None, row_lengths=(5,))
        assert torch.equal(both[line : line + 1], alone)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"row_lengths": (3,), "softcap": 50.0}, "attends with softcap"),
        ({"row_lengths": (3,), "s_aux": torch.zeros(2)}, "attends with s_aux"),
        ({"row_lengths": (3,), "dropout": 0.1}, "drops attention out"),
    ],
)
def test_what_the_kernel_cannot_compute_is_refused(
    arguments: dict[str, object], reason: str
) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=reason):
        row_attention(torch.nn.Identity(), q, q, q, None, **arguments)  # type: ignore[arg-type]
