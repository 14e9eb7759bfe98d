"""Service times and lengths as a real run had them, from its metrics.jsonl and groups.jsonl.

Refuses to know recipes but for the number of workers that the run had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from grpo.errors import UserError
from orchestration.run_directory import GROUPS_FILE, METRICS_FILE
from orchestration.simulation.config import SimulationConfig

Record = Mapping[str, Any]  # a line of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run says of its parts."""

    settings: Mapping[str, float]  # of the simulation section
    lengths: Sequence[Sequence[int]]  # of the completions of each group, rising

    def fill(self, given: SimulationConfig) -> SimulationConfig:
        """The section with everything that nobody wrote down replaced by what was measured."""
        free = {k: v for k, v in self.settings.items() if k not in given.model_fields_set}
        return given.model_copy(update=free)

    def lengths_beside(self, given: SimulationConfig) -> Sequence[Sequence[int]] | None:
        """None where the section says how long completions are."""
        return None if {"mean_tokens", "spread"} & given.model_fields_set else self.lengths


def measured(run: Path, *, workers: int) -> Measured:
    """Of a run with so many rollout workers; UserError where it has not trained."""
    steps = [line for line in _lines(run / METRICS_FILE) if "timing_s/train" in line]
    groups = [_seen(line) for line in _lines(run / GROUPS_FILE) if line["rollouts"]]
    if not steps or not groups:
        raise UserError(
            f"--like {run}: found {len(steps)} steps in {METRICS_FILE} and {len(groups)} groups in "
            f"{GROUPS_FILE}; expected at least one of each. Name a run that has trained a step"
        )
    throughput = sum(sum(group.lengths) for group in groups) / _covered_s(groups) / workers
    one_rollout = median(group.lengths[-1] / group.sampling_s for group in groups)
    return Measured(
        lengths=[group.lengths for group in groups],
        settings={
            "worker_tokens_per_s": throughput,
            "worker_rollouts": max(1, round(throughput / one_rollout)),
            "prompt_tokens": max(1, round(fmean(group.prompt_tokens for group in groups))),
            "scorer_s": median(group.scoring_s for group in groups),
            "constant_share": fmean(group.is_constant for group in groups),
            "learner_tokens_per_s": median(
                line["num_tokens"] / line["timing_s/train"] for line in steps
            ),
            "publish_s": median(line["timing_s/sync/publish"] for line in steps),
            "load_s": median(line["timing_s/sync/load"] for line in steps),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """One line of groups.jsonl."""

    lengths: Sequence[int]  # rising
    prompt_tokens: int
    admitted: float
    generated: float
    scoring_s: float
    is_constant: bool

    @property
    def sampling_s(self) -> float:
        return max(self.generated - self.admitted, 1e-3)  # times are written in milliseconds


def _seen(line: Record) -> _Seen:
    times, rollouts = line["times"], line["rollouts"]
    scores = [rollout["scores"] for rollout in rollouts]
    return _Seen(
        lengths=sorted(max(1, len(rollout["tokens"])) for rollout in rollouts),
        prompt_tokens=line["prompt"]["num_tokens"],
        admitted=times["admitted"],
        generated=times["generated"],
        scoring_s=times["scored"] - times["generated"],
        is_constant=all(score == scores[0] for score in scores),
    )


def _covered_s(groups: Sequence[_Seen]) -> float:
    """Seconds in which at least one group was sampled: a pause of the run does not count."""
    covered, end = 0.0, float("-inf")
    for group in sorted(groups, key=lambda group: group.admitted):
        begin, last = max(group.admitted, end), group.admitted + group.sampling_s
        covered += max(0.0, last - begin)
        end = max(end, last)
    return covered


def _lines(path: Path) -> Iterator[Record]:
    """The whole lines of a file; the last one may still be being written."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--like: {path} cannot be read ({error}); expected the folder of a run"
        ) from None
