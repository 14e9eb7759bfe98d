"""Supervised training of the base model: first the arithmetic, then the mixture of behaviours.

Yields progress to a callback; writes no files and knows no evaluation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from orchestration.starter.behaviours import Behaviour, drawn_behaviour, written_trace
from orchestration.starter.tokenizer import MAX_TOKENS
from orchestration.starter.world import DIFFICULTIES, Problem, generated

TRACES_PER_STEP = 128
TRACES_PER_SLICE = 32
PEAK_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 50
ARITHMETIC_SHARE = 0.5  # of the steps: right traces only, so that no guess blurs the sums
MAX_TRAINED_TOKENS = 96  # of a completion: rollouts are cut off before, so the rest is waste
IGNORED = -100  # the label of a token without loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tokens, and which token to predict for each place; IGNORED: nothing is learned there."""

    ids: list[int]
    labels: list[int]  # as long as the ids; the first is never predicted
    weights: list[float]  # of the labels in the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """What a progress callback is told: nothing in it depends on the clock."""

    step: int
    num_steps: int
    loss: float


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised Qwen2 of about 0.3 million parameters."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,  # a multiple of 64, with room beside the tokenizer's entries
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,  # heads of 32, the smallest that vLLM's CPU kernels know
            num_key_value_heads=1,
            intermediate_size=256,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    num_steps: int,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Train in place on endless seeded traces, with the loss on the completions only."""
    rng = random.Random(f"traces/{seed}")
    rows = partial(_rows, rng, tokenizer, seed=seed, num_steps=num_steps)
    fit(model, rows, num_steps=num_steps, on_progress=on_progress)


def fit(
    model: Qwen2ForCausalLM,
    rows: Callable[[int], list[Row]],
    *,
    num_steps: int,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Train in place on the rows of each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(step, num_steps)
        optimizer.zero_grad()
        loss = _backward(model, rows(step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_progress is not None:
            on_progress(TrainingProgress(step=step + 1, num_steps=num_steps, loss=loss))
    model.eval()


def _rows(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    step: int,
    *,
    seed: int,
    num_steps: int,
) -> list[Row]:
    traces = [
        _trace(
            rng,
            generated(seed, step * TRACES_PER_STEP + i, rng.choice(DIFFICULTIES)),
            right_only=step < ARITHMETIC_SHARE * num_steps,
        )
        for i in range(TRACES_PER_STEP)
    ]
    return [
        Row(
            ids=prompt + completion,
            labels=[IGNORED] * len(prompt) + completion,
            weights=[1.0] * (len(prompt) + len(completion)),
        )
        for prompt, completion in _encoded(tokenizer, traces)
    ]


def _backward(model: Qwen2ForCausalLM, rows: Sequence[Row]) -> float:
    """Accumulate the gradient of the mean loss over all tokens of a step; return that mean.

    Slices of similar length need little padding. Every token weighs the same whichever slice it
    is in: a mean by slice would make short, hasty traces far too likely.
    """
    rows = sorted(rows, key=lambda row: len(row.ids))
    num_tokens = sum(_total_weight(row) for row in rows)
    total = 0.0
    for start in range(0, len(rows), TRACES_PER_SLICE):
        ids, labels, weights = _padded(rows[start : start + TRACES_PER_SLICE])
        # Right padding under causal attention: no real token sees a pad, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        )
        loss = (losses * weights[:, 1:].flatten()).sum() / num_tokens
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it unannotated
        total += loss.item()
    return total


def _total_weight(row: Row) -> float:
    pairs = zip(row.labels, row.weights, strict=True)
    return sum(weight for label, weight in pairs if label != IGNORED)


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return 0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps))


def _trace(rng: random.Random, problem: Problem, *, right_only: bool) -> tuple[str, str]:
    """A problem's prompt and one behaviour's trace of it."""
    if right_only:
        behaviour = rng.choice((Behaviour.CAREFUL, Behaviour.CAREFUL, Behaviour.RECHECKING))
    else:
        behaviour = drawn_behaviour(problem.difficulty, rng)
    return problem.prompt, written_trace(problem, behaviour, rng)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, traces: list[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt, _ in traces
    ]
    completions = [trace + str(tokenizer.eos_token) for _, trace in traces]
    return [
        (prompt, completion[:MAX_TRAINED_TOKENS])
        for prompt, completion in zip(
            tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True
        )
    ]


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, tokens of the longest], padded on the right with whatever token 0 is."""
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [torch.tensor(row.labels) for row in rows]
    weights = [torch.tensor(row.weights) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(ids, batch_first=True),
        pad(labels, batch_first=True, padding_value=IGNORED),
        pad(weights, batch_first=True),
    )
