"""Reads metrics.jsonl back, whatever has become of it: damaged lines are left out and said.

Refuses to know what the metrics mean. (Its write side is `RunDirectory`.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from orchestration.run_directory import LINE_STEP, METRICS_FILE

Metrics = dict[str, float | None]  # None: it was not finite
_LINE = TypeAdapter(Metrics)


def read_metrics(
    run: Path, remark: Callable[[str], None], *, step: int | None = None
) -> dict[int, Metrics]:
    """By step, its lines together; of one step, or of all."""
    found: dict[int, Metrics] = {}
    for line in read_lines(run, remark, step=step):
        found.setdefault(int(line.pop("step") or 0), {}).update(line)
    return found


def read_lines(
    run: Path, remark: Callable[[str], None], *, step: int | None = None
) -> list[Metrics]:
    """Each with its step, in order; of one step, or of all."""
    found: list[Metrics] = []
    num_damaged = 0
    try:
        with (run / METRICS_FILE).open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    continue  # it is being written, or was when the process died
                begin = LINE_STEP.match(line)
                if begin is not None and step not in (None, int(begin[1])):
                    continue
                try:
                    values = _LINE.validate_json(line)
                except ValidationError:
                    values = {}
                if "step" in values:
                    found.append(values)
                else:
                    num_damaged += 1
    except OSError as error:
        remark(f"{run / METRICS_FILE} cannot be read ({error.strerror}): its metrics are left out")
    if num_damaged:
        remark(f"{run / METRICS_FILE}: {num_damaged} damaged lines are left out")
    return found
