"""What one core of the driver sustains, and how well generation and learning overlap.

    python -m benchmarks.driver_capacity                   8, 64 and 512 workers, small
    python -m benchmarks.driver_capacity --groups 50000    is the memory flat?

The driver, buffer, pools, group tasks and batch builder are those of a run; rollout workers,
scorer and learner only wait, in simulated time (`covey simulate`), so the CPU time is the
driver's. Arrays are real: 16 rollouts of 1,024 tokens in each group. What the simulated roles
themselves cost is not counted, nor are Ray's calls. The second table is what a run also writes
into groups.jsonl for each rollout. The third has generation and learning of equal cost and
long-tailed lengths, and 4 times as many rollouts in a step as places to generate them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from grpo.batch import build_batch
from grpo.types import FinishReason, Group, Rollout, Score, Span
from orchestration.config import Recipe
from orchestration.group_task import GroupTimes
from orchestration.records import trained_record
from orchestration.run_directory import encode_line
from orchestration.simulation.engine import random_tokens
from orchestration.simulation.report import SimulationReport
from orchestration.simulation.run import simulated, simulated_prompts
from orchestration.simulation.services import long_tailed_lengths, services

ROLLOUTS, TOKENS, PROMPT_TOKENS = 16, 1024, 64
MAX_TOKENS = 8 * TOKENS  # the budget of a completion; it cuts one in 500
SPREAD = 0.8  # of the lengths: standard deviation of the logarithm
GROUPS_AT_A_WORKER = 4  # under way at a time
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Print capacity, cost of the records and efficiency."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.driver_capacity")
    parser.add_argument("--groups", type=int, default=1024, help="at least so many for each size")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    options = parser.parse_args(arguments)
    print(f"groups of {ROLLOUTS} rollouts of {TOKENS} tokens, max_staleness 1, GRPO")
    print(
        f"{'workers':>8}{'groups':>8}{'groups/s':>10}{'rollouts/s':>12}{'us/rollout':>12}"
        f"{'KiB/rollout under way':>23}{'MiB at a quarter':>18}{'at the end':>12}"
    )
    capacity = [_capacity(workers, options.groups) for workers in options.workers]
    record_us, record_bytes = _record_cost()
    print(
        f"\ngroups.jsonl: {record_us:.0f} us and {record_bytes / 1024:.1f} KiB a rollout, "
        f"{record_bytes / TOKENS:.1f} bytes a token"
    )
    for workers, us in zip(options.workers, capacity, strict=True):
        print(f"  with it, {workers} workers: {1e6 / (us + record_us):,.0f} rollouts/s")
    _print_efficiency()


def _recipe(workers: int, groups: int, steps: int, **changed: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "capacity",
            "model": "none",
            "data": {"train": "none"},
            "steps": steps,
            "num_prompts_per_step": groups,
            "algorithm": {"name": "grpo", "num_generations": ROLLOUTS},
            "scorers": [{"name": "answer", "rule": "exact", "actors": 8}],
            "sampling": {"max_prompt_length": PROMPT_TOKENS, "max_completion_length": MAX_TOKENS},
            "rollout": {"workers": workers},
            **changed,
        }
    )


def _capacity(workers: int, groups: int) -> float:
    """CPU microseconds of a rollout."""
    per_step = workers * GROUPS_AT_A_WORKER // 2
    recipe = _recipe(
        workers,
        per_step,
        max(8, -(-groups // per_step)),
        max_staleness=1,
        window=per_step,
        simulation={
            "mean_tokens": TOKENS,
            "spread": 0,
            "prompt_tokens": PROMPT_TOKENS,
            "worker_rollouts": GROUPS_AT_A_WORKER * ROLLOUTS // 2,
            "learner_tokens_per_s": 5000.0 * workers * (TOKENS + PROMPT_TOKENS) / TOKENS,
            "scorer_s": 0.001,
        },
    )
    before, resident = _resident_mib(), [0.0]
    found = simulated(recipe, services(recipe), lambda step, now: resident.append(_resident_mib()))
    quarter = len(resident) // 4
    under_way = recipe.slots * ROLLOUTS
    us = found.driver_us_per_rollout
    print(
        f"{workers:>8}{found.trained_groups:>8}{1e6 / us / ROLLOUTS:>10,.0f}{1e6 / us:>12,.0f}"
        f"{us:>12.0f}{1024 * (max(resident) - before) / under_way:>23.0f}"
        f"{max(resident[: quarter + 1]):>18,.0f}{max(resident[-quarter:]):>12,.0f}",
        flush=True,
    )
    return us


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def _record_cost() -> tuple[float, float]:
    """CPU microseconds and bytes of a rollout in groups.jsonl, with log-probs as real ones."""
    recipe = _recipe(1, 1, 1)
    choice = recipe.algorithm
    pipeline = choice.algorithm.pipeline(
        choice.settings, outcomes=recipe.weights, max_completion_length=TOKENS
    )
    groups = [_group(number) for number in range(16)]
    built = build_batch(pipeline, groups, None, step=1, version=0, num_updates=1)
    rows = [row for update in built.batch.updates for row in update]
    started, size = time.process_time(), 0
    for rewarded in built.rewarded:
        own = [row for row in rows if row.group == rewarded.group.id]
        times = GroupTimes(admitted=0.0, generated=1.0, scored=2.0)
        record = trained_record(rewarded, own, terms=["answer"], times=times, trained=3.0)
        size += len(encode_line(1, record))
    count = len(groups) * ROLLOUTS
    return 1e6 * (time.process_time() - started) / count, size / count


def _group(number: int) -> Group:
    rng = np.random.default_rng(number)
    prompt = simulated_prompts(PROMPT_TOKENS)[0]
    rollout = Rollout(
        index=0,
        context=prompt.tokens,
        tokens=random_tokens(TOKENS)[:TOKENS],
        log_probs=np.zeros(TOKENS, np.float32),
        origins=np.zeros(TOKENS, np.uint8),
        versions=np.zeros(TOKENS, np.int32),
        text="x" * TOKENS,
        token_ends=np.arange(1, TOKENS + 1, dtype=np.int32),
        finish_reason=FinishReason.STOP,
    )
    rollouts = [
        replace(rollout, index=i, log_probs=-rng.exponential(size=TOKENS).astype(np.float32))
        for i in range(ROLLOUTS)
    ]
    scores = [
        Score(scorer="answer", span=Span(rollout=i, start=0, end=TOKENS), value=float(i % 2))
        for i in range(ROLLOUTS)
    ]
    return Group(id=number, prompt=prompt, rollouts=tuple(rollouts), scores=tuple(scores))


def _print_efficiency() -> None:
    print(f"\nequal cost, long-tailed lengths: standard deviation of the logarithm {SPREAD}")
    print(f"{'rollouts of a step':>20}{'staleness':>11}{'step /':>9}{'workers':>9}{'learner':>9}")
    print(f"{'for each place':>20}{'bound':>11}{'ideal':>9}{'busy':>9}{'busy':>9}")
    for rollouts_per_place in (4, 16, 64):
        for bound in (0, 1, 2):
            found = _efficiency(bound, rollouts_per_place)
            print(
                f"{rollouts_per_place:>20}{bound:>11}{found.efficiency:>9.3f}"
                f"{found.rollout_busy:>9.0%}{found.learner_busy:>9.0%}",
                flush=True,
            )


def _efficiency(
    bound: int, rollouts_per_place: int, *, learning_cost: float = 1.0
) -> SimulationReport:
    """64 groups in a step of 1,024 rollouts on 8 workers; costs are relative to generation."""
    workers, groups, tokens_per_s = 8, 64, 4000.0
    lengths = np.minimum(long_tailed_lengths(TOKENS, SPREAD), MAX_TOKENS)
    trained_per_sampled = 1 + PROMPT_TOKENS / lengths.mean()
    recipe = _recipe(
        workers,
        groups,
        40,
        max_staleness=bound,
        simulation={
            "mean_tokens": TOKENS,
            "spread": SPREAD,
            "prompt_tokens": PROMPT_TOKENS,
            "worker_tokens_per_s": tokens_per_s,
            "worker_rollouts": groups * ROLLOUTS // workers // rollouts_per_place,
            "learner_tokens_per_s": workers * tokens_per_s * trained_per_sampled / learning_cost,
            "publish_s": 0.1,
            "load_s": 0.1,
        },
    )
    return simulated(recipe, services(recipe), lambda step, now: None)


if __name__ == "__main__":
    main()
