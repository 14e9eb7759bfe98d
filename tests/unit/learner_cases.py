"""Tiny models, rows and learners for the tests of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo.objective import Objective
from grpo.types import Origin, TrainBatch, TrainRow
from learner.config import LearnerConfig
from learner.rank import LearnerRank
from orchestration.row_arrays import STREAMS

VOCABULARY = 64
GRPO = {"name": "grpo", "num_generations": 4}
EVERYTHING = {"name": "grpo", "num_generations": 4, "beta": 0.1, "entropy_coef": 0.01}


def write_model(folder: Path, *, tied: bool = True, seed: int = 0, hidden_size: int = 32) -> str:
    """A two-layer Qwen2 with weights large enough for sharp distributions."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6.0)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    characters = {character: 2 + index for index, character in enumerate("abcdefgh")}
    vocabulary = {"<pad>": 0, "<eos>": 1} | characters
    Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=None, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


def random_row(rng: np.random.Generator, index: int, *, version: int = 0) -> TrainRow:
    """A row of random lengths, tokens, advantages and behaviour."""
    num_tokens = int(rng.integers(1, 14))
    origins = np.full(num_tokens, Origin.POLICY, np.uint8)
    origins[: num_tokens // 4] = Origin.GUIDANCE
    guided = origins == Origin.GUIDANCE
    return TrainRow(
        group=index // 4,
        index=index % 4,
        context=rng.integers(2, VOCABULARY, int(rng.integers(1, 9))).astype(np.int32),
        tokens=rng.integers(2, VOCABULARY, num_tokens).astype(np.int32),
        weights=np.where(guided, 0, rng.uniform(0.5, 1.5, num_tokens) / 50).astype(np.float32),
        advantages=np.full(num_tokens, rng.normal(), np.float32),
        policy_weights=rng.uniform(0.5, 1.0, num_tokens).astype(np.float32),
        behaviour_log_probs=np.where(guided, 0, -rng.uniform(1, 5, num_tokens)).astype(np.float32),
        versions=np.where(guided, -1, version).astype(np.int32),
        origins=origins,
    )


def random_rows(count: int, *, seed: int = 0, version: int = 0) -> list[TrainRow]:
    rng = np.random.default_rng(seed)
    return [random_row(rng, index, version=version) for index in range(count)]


def row_of(context: int, completion: int) -> TrainRow:
    """A row of these lengths."""
    long = random_rows(1)[0]
    size = {name: np.resize(getattr(long, name), completion) for name in STREAMS}
    return replace(long, context=np.resize(long.context, context), **size)


def overflowing_row(seed: int = 0) -> TrainRow:
    """A row with a loss of 3.2e38 at most, which float32 holds, and a gradient that it does not.

    One token counts: 1.6e38 times the importance, whose cap of 2 the low behaviour reaches.
    """
    row = random_rows(1, seed=seed)[0]
    num_tokens = len(row.tokens)
    return replace(
        row,
        weights=np.eye(1, num_tokens, dtype=np.float32)[0],
        policy_weights=np.ones(num_tokens, np.float32),
        advantages=np.full(num_tokens, 1.6e38, np.float32),
        behaviour_log_probs=np.full(num_tokens, -50, np.float32),
        origins=np.full(num_tokens, Origin.POLICY, np.uint8),
    )


def batch_of(*updates: Sequence[TrainRow], step: int = 0, version: int = 0) -> TrainBatch:
    return TrainBatch(step=step, version=version, updates=tuple(tuple(rows) for rows in updates))


def torch_config(**settings: object) -> LearnerConfig:
    return LearnerConfig.model_validate({"backend": "torch", "learning_rate": 1e-2} | settings)


def rank_of(
    model: str,
    config: LearnerConfig,
    *,
    algorithm: dict[str, object] = EVERYTHING,
    rank: int = 0,
    master: str = "127.0.0.1:29500",
    total_steps: int = 10,
    objective: Objective | None = None,
) -> LearnerRank:
    """A started learner rank."""
    learner = LearnerRank(
        model=model,
        config=config,
        algorithm=algorithm,
        total_steps=total_steps,
        temperature=0.8,
        rank=rank,
        world_size=config.ranks,
        master=master,
        seed=0,
        objective=objective,
    )
    learner.start()
    return learner


def save(learner: LearnerRank, folder: Path) -> None:
    """Both halves of a checkpoint, one after the other."""
    learner.snapshot()
    learner.write(str(folder))


def merged_weights(
    base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor], *, scale: float
) -> dict[str, torch.Tensor]:
    """Weights of a model with adapters added, whose names are those of peft's files."""
    merged = dict(base)
    for name in base:
        a, b = (
            adapters.get(f"base_model.model.{name.removesuffix('weight')}{kind}.weight")
            for kind in ("lora_A", "lora_B")
        )
        if a is not None and b is not None:
            merged[name] = base[name] + scale * b @ a
    return merged


def published(learner: LearnerRank) -> dict[str, torch.Tensor]:
    """What a sync of the learner carries."""
    bundle = learner.publish(0)
    assert bundle is not None
    return load(bundle.payload.tobytes())


def trained(model: str, config: LearnerConfig, *, steps: int = 2) -> LearnerRank:
    """A learner after some steps on random rows."""
    learner = rank_of(model, config)
    for step in range(steps):
        learner.train(batch_of(random_rows(8, seed=step), step=step))
    return learner
