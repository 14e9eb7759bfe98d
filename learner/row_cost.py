"""What a row costs by its length, so that ranks that wait for each other have as much to do.

Refuses to know rows and ranks. All numbers are integers, so that every rank finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """per_token * n + per_pair * n**2 of a row of n tokens; the unit means nothing.

    Counted in multiply-adds of a forward pass, of which a backward pass has twice as many. For
    each token, with H hidden, I intermediate, A = heads * head size and K = key-value heads *
    head size:

        a layer's projections   H * (A + 2 K) + A * H    queries, keys and values; output
        its gated feed-forward  3 * H * I
        output layer            H * vocabulary

    In attention a token sees (n + 1) / 2 others on average, and each pair costs A for the score
    and A for the weighed value: A * n**2 for a row and layer. What a window leaves out is counted,
    as is the output layer for tokens of the context, which do not run through it.
    """

    per_token: int
    per_pair: int

    def __call__(self, num_tokens: int) -> int:
        return self.per_token * num_tokens + self.per_pair * num_tokens**2

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Self:
        """Of a decoder of this shape."""
        shape = config.get_text_config()
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        # Not every architecture names these three; what stands in is what those do without saying.
        head_size = getattr(shape, "head_dim", None) or hidden // heads
        key_heads = getattr(shape, "num_key_value_heads", None) or heads
        intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
        queries, keys = heads * head_size, key_heads * head_size
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * intermediate
        return cls(
            per_token=shape.num_hidden_layers * layer + hidden * shape.vocab_size,
            per_pair=shape.num_hidden_layers * queries,
        )


BY_TOKENS = RowCost(per_token=1, per_pair=0)
