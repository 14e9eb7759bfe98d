"""The learner's step against a bare torch loop, and packed rows against padded ones.

    python -m benchmarks.learner_step                      0.8 M and 10 M parameters
    python -m benchmarks.learner_step --sizes 50M --rows 16

The same rows, whose lengths have a long tail, go through three loops, in turns:

    learner  LearnerRank.train of GRPO with the torch backend
    bare     the same packed micro-batches through the same model: clipped policy gradient, AdamW
    padded   like bare, but each row has a line of its own, padded to the longest of its micro-batch

Ratios are medians over the turns, of CPU seconds where there is no GPU: other work on the machine
does not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.random_models import SHAPES, written_model
from grpo.types import Origin, TrainBatch, TrainRow
from learner.config import LearnerConfig
from learner.inputs import stream
from learner.packing import Block, blocks, pack
from learner.rank import LearnerRank
from learner.row_attention import ROW_ATTENTION, ROW_LENGTHS

MAX_TOKENS, CONTEXT, TURNS = 4096, 32, 5
CONFIG = LearnerConfig(
    backend="torch", cpus_per_rank=2, learning_rate=1e-6, max_tokens_per_microbatch=MAX_TOKENS
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print tokens/s of the loops and where the learner's time goes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner_step")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["0.8M", "10M"])
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args(arguments)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            _compare(size, written_model(size, Path(folder)), options.rows)


def _compare(size: str, model: Path, num_rows: int) -> None:
    rows = long_tailed_rows(num_rows, vocabulary=SHAPES[size][-1])
    batch = TrainBatch(step=1, version=0, updates=(rows,))
    learner = _learner(model)
    packed = blocks(rows, max_tokens=MAX_TOKENS, rank=0, ranks=1)
    phases: list[dict[str, float]] = []
    loops: dict[str, Callable[[], object]] = {
        "learner": lambda: phases.append(dict(learner.train(batch).timings_s)),
        "bare": _bare_loop(model, packed),
        "padded": _bare_loop(model, padded(rows), is_padded=True),
    }
    for run in loops.values():
        run()  # allocations and kernels are warm after it
    phases.clear()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(TURNS):
        for name, run in loops.items():
            started = _clock()
            run()
            seconds[name].append(_clock() - started)
    _report(size, rows, seconds, phases, packed)


def _report(
    size: str,
    rows: Sequence[TrainRow],
    seconds: dict[str, list[float]],
    phases: Sequence[dict[str, float]],
    packed: Sequence[Block],
) -> None:
    tokens = sum(row.num_tokens for row in rows)
    print(f"{size} parameters, {len(rows)} rows, {tokens} tokens, float32, {TURNS} turns")
    for name, found in seconds.items():
        print(f"  {name:8} {tokens / median(found):10.0f} tokens/s")
    share = median(b / a for a, b in zip(seconds["learner"], seconds["bare"], strict=True))
    gain = median(p / b for b, p in zip(seconds["bare"], seconds["padded"], strict=True))
    computed = {"packed": _area(packed), "padded": _area(padded(rows))}
    print(f"  learner / bare   {share:.3f} of its tokens/s")
    print(
        f"  packed / padded  {gain:.2f} times its tokens/s; of the tokens computed, "
        + ", ".join(f"{tokens / area:.1%} {name}" for name, area in computed.items())
        + " belong to rows"
    )
    wholes = [sum(found.values()) for found in phases]
    parts = {
        name: median(found[name] / whole for found, whole in zip(phases, wholes, strict=True))
        for name in phases[0]
    }
    print("  of the learner   " + ", ".join(f"{name} {part:.1%}" for name, part in parts.items()))


def long_tailed_rows(count: int, *, vocabulary: int) -> tuple[TrainRow, ...]:
    """Completions of a median of 150 tokens, a tenth of them longer than 540, at most 1,024."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(150), 1.0, count), 4, 1024).astype(int)
    return tuple(_row(rng, index, int(length), vocabulary) for index, length in enumerate(lengths))


def padded(rows: Sequence[TrainRow]) -> list[Block]:
    """Micro-batches of rows of about the same length, each in a line of its own."""
    found: list[Block] = []
    line_up = sorted(rows, key=lambda row: -row.num_tokens)
    while line_up:
        count = max(1, MAX_TOKENS // line_up[0].num_tokens)
        found.append(_one_line_each(line_up[:count]))
        line_up = line_up[count:]
    return found


def _one_line_each(rows: Sequence[TrainRow]) -> Block:
    """As `pack`, without putting rows behind one another."""
    parts = [pack([row]) for row in rows]
    length = max(part.input_ids.shape[1] for part in parts)

    def longer(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, length - values.shape[1]))

    return Block(
        rows=tuple(rows),
        input_ids=torch.cat([longer(part.input_ids) for part in parts]),
        position_ids=torch.arange(length).expand(len(rows), length).contiguous(),
        predictors=torch.cat([part.predictors + i * length for i, part in enumerate(parts)]),
        targets=torch.cat([part.targets for part in parts]),
        row=torch.cat([part.row + i for i, part in enumerate(parts)]),
        places=tuple(range(len(rows))),
    )


def _bare_loop(
    model: Path, micro_batches: Sequence[Block], *, is_padded: bool = False
) -> Callable[[], None]:
    """What anybody would write by hand, without metrics, reports and checks."""
    implementation = "sdpa" if is_padded else ROW_ATTENTION
    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation=implementation).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    device = torch.device("cpu")

    def run() -> None:
        for block in micro_batches:
            hidden = policy.model(
                input_ids=block.input_ids,
                position_ids=block.position_ids,
                use_cache=False,
                **({} if is_padded else {ROW_LENGTHS: block.row_lengths}),
            ).last_hidden_state
            logits = policy.lm_head(hidden.flatten(0, 1)[block.predictors])
            chosen = logits.log_softmax(-1).gather(-1, block.targets[:, None]).squeeze(-1)
            ratio = (chosen - chosen.detach()).exp()
            advantages = stream([row.advantages for row in block.rows], device)
            weights = stream([row.weights for row in block.rows], device)
            unclipped = ratio * advantages
            clipped = ratio.clamp(0.8, 1.2) * advantages
            torch.autograd.backward(-(weights * torch.minimum(unclipped, clipped)).sum())
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _learner(model: Path) -> LearnerRank:
    learner = LearnerRank(
        model=str(model),
        config=CONFIG,
        algorithm={"name": "grpo"},
        total_steps=100,
        temperature=1.0,
        rank=0,
        world_size=1,
        master="127.0.0.1:0",
        seed=0,
    )
    learner.start()
    return learner


def _row(rng: np.random.Generator, index: int, length: int, vocabulary: int) -> TrainRow:
    return TrainRow(
        group=index // 8,
        index=index % 8,
        context=rng.integers(0, vocabulary, CONTEXT).astype(np.int32),
        tokens=rng.integers(0, vocabulary, length).astype(np.int32),
        weights=np.full(length, 1e-4, np.float32),
        advantages=np.full(length, rng.standard_normal(), np.float32),
        policy_weights=np.ones(length, np.float32),
        behaviour_log_probs=np.full(length, -np.log(vocabulary), np.float32),
        versions=np.zeros(length, np.int32),
        origins=np.full(length, Origin.POLICY, np.uint8),
    )


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _area(micro_batches: Sequence[Block]) -> int:
    return sum(block.input_ids.numel() for block in micro_batches)


if __name__ == "__main__":
    main()
