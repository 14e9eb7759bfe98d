"""How well a model answers starter problems: pass@1, length and cut-offs by difficulty.

Rolls out with plain transformers, since the engines are not needed to describe the base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from orchestration.starter.world import Problem, is_solved

MAX_COMPLETION_LENGTH = 64  # tokens; every careful trace ends well within it, a rambling one rarely
ROWS_PER_BATCH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One rolled-out answer."""

    problem: Problem
    text: str
    num_tokens: int  # the eos token included
    is_truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Means over the completions of one difficulty."""

    difficulty: int
    pass_at_1: float
    mean_tokens: float
    share_truncated: float


def rolled_out(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    num_completions: int,
    seed: int,
    max_completion_length: int = MAX_COMPLETION_LENGTH,
) -> list[Completion]:
    """`num_completions` answers to each problem at temperature 1."""
    torch.manual_seed(seed)
    rows = [problem for problem in problems for _ in range(num_completions)]
    completions: list[Completion] = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.prompt}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for problem in batch
        ]
        encoded = tokenizer(prompts, padding=True, return_tensors="pt")
        ids = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_completion_length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )[:, encoded["input_ids"].shape[1] :]
        completions += [
            _completion(problem, row, tokenizer)
            for problem, row in zip(batch, ids.tolist(), strict=True)
        ]
    return completions


def measured(completions: Iterable[Completion]) -> tuple[Measurement, ...]:
    """One measurement for each difficulty, easiest first."""
    by_difficulty: dict[int, list[Completion]] = {}
    for completion in completions:
        by_difficulty.setdefault(completion.problem.difficulty, []).append(completion)
    return tuple(
        Measurement(
            difficulty=difficulty,
            pass_at_1=_mean(not c.is_truncated and is_solved(c.problem, c.text) for c in group),
            mean_tokens=_mean(c.num_tokens for c in group),
            share_truncated=_mean(c.is_truncated for c in group),
        )
        for difficulty, group in sorted(by_difficulty.items())
    )


def _completion(problem: Problem, ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Completion:
    is_truncated = tokenizer.eos_token_id not in ids
    length = len(ids) if is_truncated else ids.index(tokenizer.eos_token_id)
    return Completion(
        problem=problem,
        text=str(tokenizer.decode(ids[:length])),
        num_tokens=length if is_truncated else length + 1,
        is_truncated=is_truncated,
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
