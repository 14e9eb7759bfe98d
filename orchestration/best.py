"""Which checkpoints did best on the held-out prompts, as every evaluation of the run found it.

    RUN/checkpoints/evaluations.json   pass@1 and mean score by step
    RUN/checkpoints/best               the name of the best folder

The higher pass@1 wins, then the higher mean score, then the earlier step. Refuses to know how a
checkpoint is written and when others are deleted.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from orchestration.checkpoint import CHECKPOINTS
from orchestration.evaluation import EvalReport
from orchestration.run_directory import write_json

BEST_FILE = "best"
EVALUATIONS_FILE = "evaluations.json"
METRICS = ("eval/pass@1", "eval/mean_score")


class Evaluations:
    """What the steps of one run scored; kept in a file, so that a resumed run compares with it."""

    def __init__(self, run: Path, *, step: int) -> None:
        """Steps after `step` were abandoned by resuming from it."""
        self._path = run / CHECKPOINTS / EVALUATIONS_FILE
        self._found: dict[int, list[float]] = {}
        if self._path.exists():
            saved = json.loads(self._path.read_text(encoding="utf-8"))["steps"]
            self._found = {int(n): values for n, values in saved.items() if int(n) <= step}

    @property
    def steps(self) -> Collection[int]:
        """Those that were evaluated."""
        return self._found.keys()

    def record(self, step: int, report: EvalReport) -> None:
        """Add what an evaluation found."""
        metrics = report.metrics()
        self._found[step] = [metrics[name] for name in METRICS]
        self._path.parent.mkdir(exist_ok=True)
        write_json(self._path, {"metrics": METRICS, "steps": self._found})

    def best(self, steps: Collection[int], count: int) -> list[int]:
        """The `count` best of these steps, the best first; those without evaluation are none."""
        evaluated = [step for step in steps if step in self._found]
        return sorted(evaluated, key=self._rank)[:count]

    def _rank(self, step: int) -> tuple[float, ...]:
        return (*(-value for value in self._found[step]), step)
