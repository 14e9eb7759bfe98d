"""Real `covey` processes for the tests: start them, read their lines, look at what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestration.starter.data import write_datasets

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "orchestration" / "starter" / "model"


def covey(*arguments: str) -> subprocess.Popen[str]:
    """The command line as a user starts it; standard output and error in one stream of lines."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    """Read up to the first line that begins so; fails with the whole output if it ends before."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return seen
    raise AssertionError(f"the run ended without a line {beginning!r}:\n{''.join(seen)}")


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for the end; the rest of the output."""
    output, _ = process.communicate()
    return output


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind."""

    path: Path

    @property
    def summary(self) -> dict[str, object]:
        summary: dict[str, object] = json.loads((self.path / "summary.json").read_text())
        return summary

    @property
    def steps(self) -> list[dict[str, float]]:
        """The metrics of the training steps; evaluations have lines of their own."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "reward" in line]

    @property
    def groups(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.path / "groups.jsonl").read_text().splitlines()]

    def pass_at_1(self, when: str) -> float:
        report = self.summary[when]
        assert isinstance(report, dict)
        return float(report["overall"]["pass_at"]["1"])


def only_run(output: Path) -> RunFolder:
    folders = [path for path in output.iterdir() if not path.name.startswith(".")]
    assert len(folders) == 1, folders
    return RunFolder(folders[0])


def settings(folder: Path, **changes: object) -> Iterator[str]:
    """--set arguments: the quickstart on little data, writing below `folder`."""
    data = write_datasets(folder / "data", num_train=400, num_heldout=60)
    values = {
        "output": folder / "runs",
        "data.train": data.train,
        "data.evaluation": data.heldout,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    for name, value in values.items():
        yield "--set"
        yield f"{name}={'null' if value is None else value}"


def train(folder: Path, *options: str, **changes: object) -> subprocess.Popen[str]:
    """A quickstart run with changed settings."""
    arguments: Sequence[str] = ["recipes/quickstart.yaml", *settings(folder, **changes), *options]
    return covey("train", *arguments)
