"""The starter's data sets as JSON lines. Knows problems and files, no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import UserError
from orchestration.starter.world import DIFFICULTIES, Problem, Split, generated

MAX_REPEATS = 1000  # known problems in a row: less than 1 % of a tier is left


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDatasets:
    """Where the two files lie and how many problems each holds."""

    train: Path
    heldout: Path
    num_train: int
    num_heldout: int


def distinct_problems(
    num_problems: int,
    *,
    seed: int,
    split: Split,
    difficulties: Sequence[int] = DIFFICULTIES,
) -> list[Problem]:
    """Problems of one split without repeats, the difficulties in turn."""
    problems: dict[str, Problem] = {}
    index = repeats = 0
    while len(problems) < num_problems:
        difficulty = difficulties[len(problems) % len(difficulties)]
        problem = generated(seed, index, difficulty, split=split)
        repeats = repeats + 1 if problem.prompt in problems else 0
        if repeats == MAX_REPEATS:
            raise UserError(
                f"found {len(problems)} different problems, expected {num_problems}: those with "
                f"{difficulty} operations are used up; ask for fewer"
            )
        problems.setdefault(problem.prompt, problem)
        index += 1
    return list(problems.values())


def write_datasets(
    out_dir: Path, *, num_train: int = 8000, num_heldout: int = 200, seed: int = 0
) -> WrittenDatasets:
    """Write `train.jsonl` and `heldout.jsonl`: no prompt is in both, difficulties are balanced.

    Columns: id, prompt, answer, solution (the ground-truth trace), hint (a shorter problem with the
    same answer), difficulty, domain.
    """
    if num_train < 1 or num_heldout < 1:
        raise ValueError(
            f"found num_train={num_train}, num_heldout={num_heldout}; expected at least 1 of each"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    train, heldout = out_dir / "train.jsonl", out_dir / "heldout.jsonl"
    _write_lines(train, _rows(distinct_problems(num_train, seed=seed, split="train"), "train"))
    _write_lines(
        heldout, _rows(distinct_problems(num_heldout, seed=seed, split="heldout"), "heldout")
    )
    return WrittenDatasets(
        train=train, heldout=heldout, num_train=num_train, num_heldout=num_heldout
    )


def _rows(problems: list[Problem], split: Split) -> Iterable[dict[str, str | int]]:
    for number, problem in enumerate(problems):
        yield {
            "id": f"{split}-{number:05d}",
            "prompt": problem.prompt,
            "answer": str(problem.answer),
            "solution": problem.solution,
            "hint": problem.hint,
            "difficulty": problem.difficulty,
            "domain": problem.domain,
        }


def _write_lines(path: Path, rows: Iterable[dict[str, str | int]]) -> None:
    """Write to a neighbour and rename it, so that no reader sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    partial.replace(path)
