"""Which checkpoints did best on the held-out prompts, as every evaluation of the run found it.

    RUN/checkpoints/evaluations.json   pass@1 and mean score by step
    RUN/checkpoints/best               the name of the best folder

The higher pass@1 wins, then the higher mean score, then the earlier step. What is lost is found
again in metrics.jsonl. Refuses to know how a checkpoint is written and when others are deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from grpo.config import Schema
from grpo.errors import UserError
from orchestration.checkpoint import CHECKPOINTS, marked_step, whole_steps
from orchestration.evaluation import EvalReport
from orchestration.metrics_file import read_metrics
from orchestration.run_directory import METRICS_FILE, write_json

BEST_FILE = "best"
EVALUATIONS_FILE = "evaluations.json"
METRICS = ("eval/pass@1", "eval/mean_score")
Scores = tuple[float, float]  # in this order


class _Saved(Schema):
    """The content of evaluations.json."""

    metrics: tuple[Literal["eval/pass@1"], Literal["eval/mean_score"]]
    steps: dict[int, Scores]


class Evaluations:
    """What the steps of one run scored; kept in a file, so that a resumed run compares with it."""

    def __init__(self, run: Path, *, step: int) -> None:
        """Steps after `step` were abandoned by resuming from it."""
        self._path = run / CHECKPOINTS / EVALUATIONS_FILE
        saved = _read(self._path)
        self._found = {n: values for n, values in saved.items() if n <= step}

    @property
    def steps(self) -> Collection[int]:
        """Those that were evaluated."""
        return self._found.keys()

    def record(self, step: int, report: EvalReport) -> None:
        """Add what an evaluation found."""
        metrics = report.metrics()
        self._found[step] = (metrics[METRICS[0]], metrics[METRICS[1]])
        self._path.parent.mkdir(exist_ok=True)
        _write(self._path, self._found)

    def best(self, steps: Collection[int], count: int) -> list[int]:
        """The `count` best of these steps, the best first; those without evaluation are none."""
        evaluated = [step for step in steps if step in self._found]
        return sorted(evaluated, key=self._rank)[:count]

    def _rank(self, step: int) -> tuple[float, ...]:
        return (*(-value for value in self._found[step]), step)


def mend_evaluations(run: Path, step: int, remark: Callable[[str], None]) -> None:
    """Write a lost evaluations.json again from metrics.jsonl, for a run that goes on after `step`.

    UserError if it cannot be known any more what the best checkpoint scored: among checkpoints
    that were not evaluated it would be deleted as soon as it is not among the newest.
    """
    path, best = run / CHECKPOINTS / EVALUATIONS_FILE, marked_step(run, BEST_FILE)
    try:
        if path.exists() or best is None:
            _read(path)
            return
        damage = f"{path} is gone"
    except UserError as error:
        damage = str(error)
    found = _logged(run, remark)
    if best in whole_steps(run) and best <= step and best not in found:
        raise UserError(
            f"{damage}, and metrics.jsonl does not say either what step_{best}, the best "
            "checkpoint, has scored: it would be deleted like any other. Save it with `covey "
            f"export {run} best DIR`, then delete {path.with_name(BEST_FILE)} and {path.name} "
            "beside it to go on"
        )
    _write(path, found)
    remark(f"{damage}: written again from {METRICS_FILE} (evaluations found: {len(found)})")


def _logged(run: Path, remark: Callable[[str], None]) -> dict[int, Scores]:
    """The evaluations that metrics.jsonl holds; that of the starting model is no checkpoint's."""
    found = {}
    for step, metrics in read_metrics(run, remark).items():
        passed, score = (metrics.get(name) for name in METRICS)
        if step > 0 and passed is not None and score is not None:
            found[step] = (passed, score)
    return found


def _read(path: Path) -> dict[int, Scores]:
    """By step; nothing before the first evaluation."""
    try:
        return _Saved.model_validate_json(path.read_bytes()).steps
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({error.errors()[0]['msg']})") from error


def _write(path: Path, found: Mapping[int, Scores]) -> None:
    write_json(path, {"metrics": METRICS, "steps": found})
