"""Where the wall time of a quickstart step goes, and what overlapping gains on this machine.

    python -m benchmarks.quickstart_step                 20 steps, three runs of each kind, in turn
    python -m benchmarks.quickstart_step --runs 1 --steps 10

Real runs of the quickstart through Ray with vLLM and DeepSpeed, in three kinds:

    synchronous, all cores    max_staleness 0: generation and learning take turns on all cores
    synchronous, shared       max_staleness 0, half of the cores for each
    overlapped, shared        max_staleness 1, half of the cores for each, both at once

Of a synchronous step: `generating`: some group was between its admission and its last score;
`learning`: the learner's own time for packing, passes and optimiser; `transfer`: publishing and
loading weights; `driver`: the rest, which is driver, Ray and records. The first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from orchestration.starter.data import write_datasets

WARM_UP = 4  # steps; the first ones compile and fill caches
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Settings that differ between the runs."""

    name: str
    max_staleness: int
    threads: int  # of the engine, and of the learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of one step of a run."""

    wall: float  # from the end of the step before
    generating: float
    learning: float
    transfer: float

    @property
    def driver(self) -> float:
        """What is left; no number for overlapping steps."""
        return self.wall - self.generating - self.learning - self.transfer


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shares of a synchronous step and the seconds of each kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart_step")
    parser.add_argument("--steps", type=int, default=20, help="of each run (20)")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (3)")
    options = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    kinds = [
        Kind(name="synchronous, all cores", max_staleness=0, threads=cores),
        Kind(name="synchronous, shared", max_staleness=0, threads=max(1, cores // 2)),
        Kind(name="overlapped, shared", max_staleness=1, threads=max(1, cores // 2)),
    ]
    found: dict[str, list[Step]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        write_datasets(Path(folder), num_train=2000, num_heldout=10)
        for _ in range(options.runs):
            for kind in kinds:
                run = _finished_run(Path(folder), kind, options.steps)
                found[kind.name] += list(_steps(run))[WARM_UP:]
    print(f"medians over {options.runs} runs of {options.steps} steps, {cores} cores")
    for kind in kinds:
        print(_line(kind, found[kind.name], found[kinds[0].name]))


def _finished_run(folder: Path, kind: Kind, steps: int) -> Path:
    output = folder / f"{kind.max_staleness}-{kind.threads}"
    settings = {
        "steps": steps,
        "max_staleness": kind.max_staleness,
        "rollout.cpus_per_worker": kind.threads,
        "learner.cpus_per_rank": kind.threads,
        "data.train": folder / "train.jsonl",
        "data.evaluation": "null",
        "checkpoint.every": 0,
        "output": output,
    }
    command = [sys.executable, "-m", "orchestration.cli", "train", "recipes/quickstart.yaml"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind.name}: the run failed\n{done.stdout}{done.stderr}")
    return max(output.iterdir(), key=lambda run: run.stat().st_mtime)


def _steps(run: Path) -> Iterator[Step]:
    """All but the first, which has no step before it."""
    intervals: dict[int, list[tuple[float, float]]] = defaultdict(list)
    ends: dict[int, float] = {}
    for group in _lines(run / "groups.jsonl"):
        times = group.get("times")
        if isinstance(times, dict) and "trained" in times:
            step = int(str(group["step"]))
            intervals[step].append((times["admitted"], times["scored"]))
            ends[step] = times["trained"]
    for line in _lines(run / "metrics.jsonl"):
        metrics = {name: value for name, value in line.items() if isinstance(value, float)}
        step = int(str(line["step"]))
        if "timing_s/step" in metrics and step > 1:
            own = [s for name, s in metrics.items() if name.startswith("timing_s/learner/")]
            yield Step(
                wall=ends[step] - ends[step - 1],
                generating=_covered(intervals[step]),
                learning=sum(own),
                transfer=metrics["timing_s/sync/publish"] + metrics["timing_s/sync/load"],
            )


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in some interval."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def _lines(path: Path) -> Iterator[Mapping[str, object]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _line(kind: Kind, steps: Sequence[Step], first: Sequence[Step]) -> str:
    wall = median(step.wall for step in steps)
    gain = median(step.wall for step in first) / wall
    text = f"{kind.name:24}{kind.threads} threads each  {wall:6.3f} s a step  {gain:5.2f} x"
    if kind.max_staleness:
        return text
    total = sum(step.wall for step in steps)
    shares = {
        name: sum(getattr(step, name) for step in steps) / total
        for name in ("generating", "learning", "transfer", "driver")
    }
    return text + "".join(f"  {name} {share:.1%}" for name, share in shares.items())


if __name__ == "__main__":
    main()
