"""Qwen2-shaped models with random weights, by size, for benchmarks that need no real answers."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

# parameters: hidden size, layers, heads, key-value heads, vocabulary
SHAPES = {
    "0.3M": (96, 3, 4, 2, 512),
    "0.8M": (128, 4, 4, 2, 512),
    "10M": (320, 6, 5, 5, 4096),
    "50M": (640, 8, 10, 5, 8192),
    "100M": (768, 12, 12, 4, 16384),
}


def written_model(size: str, folder: Path) -> Path:
    """Write such a model to a folder, embeddings tied."""
    disable_progress_bar()
    hidden, layers, heads, kv_heads, vocabulary = SHAPES[size]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
