"""Rebuilds the starter's base model from nothing: tokenizer, training, measurement, model card.

Seeded: the same seed, steps and thread count on the same machine give the same weights.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from orchestration.starter.data import distinct_problems
from orchestration.starter.measurement import (
    MAX_COMPLETION_LENGTH,
    Measurement,
    measured,
    rolled_out,
)
from orchestration.starter.tokenizer import built_tokenizer
from orchestration.starter.training import TrainingProgress, new_model, train

DEFAULT_STEPS = 1500
NUM_MEASURED_PROBLEMS = 200  # the held-out set that `covey starter data` writes
NUM_MEASURED_COMPLETIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What was built, how long the training took, and what it measures."""

    model_dir: Path
    seed: int
    num_steps: int
    num_parameters: int
    training_s: float
    training_cpu_s: float  # of all threads; what counts where the machine is shared
    measurements: tuple[Measurement, ...]


def shipped_model_dir() -> Path:
    """The folder of the base model that the repository carries."""
    return Path(__file__).parent / "model"


def build_starter(
    out_dir: Path,
    *,
    seed: int = 0,
    num_steps: int = DEFAULT_STEPS,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> BuildReport:
    """Train the base model and write it, its tokenizer and its model card to `out_dir`."""
    if num_steps < 1:
        raise ValueError(f"found num_steps={num_steps}; expected at least 1")
    tokenizer = built_tokenizer()
    model = new_model(tokenizer, seed=seed)
    started, started_cpu = time.perf_counter(), time.process_time()
    train(model, tokenizer, seed=seed, num_steps=num_steps, on_progress=on_progress)
    training_s = time.perf_counter() - started
    training_cpu_s = time.process_time() - started_cpu
    problems = distinct_problems(NUM_MEASURED_PROBLEMS, seed=0, split="heldout")
    completions = rolled_out(
        model, tokenizer, problems, num_completions=NUM_MEASURED_COMPLETIONS, seed=seed
    )
    report = BuildReport(
        model_dir=out_dir,
        seed=seed,
        num_steps=num_steps,
        num_parameters=model.num_parameters(),
        training_s=training_s,
        training_cpu_s=training_cpu_s,
        measurements=measured(completions),
    )
    _write(report, model, tokenizer)
    return report


def _write(
    report: BuildReport, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write to a neighbouring folder first, so that `model_dir` is never half a model."""
    out_dir = report.model_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(model_card(report), encoding="ascii")
    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial.rename(out_dir)


def model_card(report: BuildReport) -> str:
    """The README of the model folder."""
    return _CARD.format(
        seed=report.seed,
        num_steps=report.num_steps,
        num_parameters=report.num_parameters,
        minutes=report.training_s / 60,
        cpu_minutes=report.training_cpu_s / 60,
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_problems=NUM_MEASURED_PROBLEMS,
        num_completions=NUM_MEASURED_COMPLETIONS,
        rows="\n".join(_row(m) for m in report.measurements),
        overall=_overall(report.measurements),
    )


def _row(m: Measurement) -> str:
    return f"| {m.difficulty} | {m.pass_at_1:.3f} | {m.mean_tokens:.1f} | {m.share_truncated:.2f} |"


def _overall(measurements: Sequence[Measurement]) -> str:
    """The mean row; the held-out set is balanced, so difficulties weigh the same."""
    n = len(measurements)
    pass_at_1 = sum(m.pass_at_1 for m in measurements) / n
    mean_tokens = sum(m.mean_tokens for m in measurements) / n
    share_truncated = sum(m.share_truncated for m in measurements) / n
    return f"| all | {pass_at_1:.3f} | {mean_tokens:.1f} | {share_truncated:.2f} |"


_CARD = """# Starter base model

A Qwen2-shaped language model of step-by-step arithmetic with {num_parameters} parameters, the base
on which covey's quickstart does reinforcement learning. It knows the arithmetic of every step, but
by design it behaves badly: it guesses without working, slips, or checks the same step over and
over, the more so the longer the problem. Reinforcement learning selects the careful answers.

It is good for trying out algorithms in a minute on two CPU cores, and for nothing else.

    prompt      7 +5 *3 -4          operations strictly left to right, values 0 to 99
    completion  7+5=12
                12*3=36
                36-4=32
                answer: 32

## How it was built

    covey starter build --out DIR --seed {seed} --steps {num_steps}

Everything is made by that command: problems, traces, tokenizer (one token a character, `answer: `
and `check: ` one token each) and weights. {num_steps} steps of supervised training, loss on the
completion only: {minutes:.1f} minutes, {cpu_minutes:.1f} minutes of processor time. The first part
teaches the arithmetic on right traces, the last the mixture of behaviours. No held-out prompt
occurs in it.

## What it measures

{num_problems} held-out problems, {num_completions} completions each, temperature 1, at most
{max_completion_length} tokens. A cut-off completion counts as wrong.

| operations | pass@1 | mean tokens | share cut off |
|---|---|---|---|
{rows}
{overall}
"""
