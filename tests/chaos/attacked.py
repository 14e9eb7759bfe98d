"""A run that is shot at until it is over, resumed when its driver dies, and what must then be true.

Refuses to know how the killing is done (target.py) and what is killed when (plan.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestration.doctor import RunState, diagnosed
from orchestration.found_run import recipe_of_run
from orchestration.ledger import Ledger
from tests.chaos.plan import Kill, Role, encoded
from tests.chaos.target import ANNOUNCED
from tests.end_to_end.runs import REPOSITORY, settings

FOLDER = "run folder: "
# Small and quick to start again; checkpoints that lie behind, so that going back to one shows.
SMALL: Mapping[str, object] = {
    "num_prompts_per_step": 4,
    "algorithm.num_generations": 4,
    "sampling.max_completion_length": 32,
    "data.evaluation": None,
    "checkpoint.every": 2,
    "rollout.engine": "transformers",
    "rollout.workers": 2,
    "rollout.cpus_per_worker": 1,
    "learner.backend": "torch",
    "learner.cpus_per_rank": 1,
    "alarms.learner_losses": 100_000,  # it is hit far more often than is healthy
    "trackers": [],
}


@dataclass(kw_only=True)
class Attack:
    """A run in processes of its own, one after the other as its driver is killed."""

    folder: Path
    kills: Sequence[Kill]
    changes: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    is_local: bool = False
    heals_between: bool = True  # each kill finds all that it may choose from
    on_kill: Callable[[dict[str, object]], None] = lambda killed: None
    on_line: Callable[[str], None] = lambda line: None
    run: Path | None = None
    killed: list[dict[str, object]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def carry_on(self) -> int:
        """The exit status of the run's last process; every killed driver is followed by another."""
        plan = self.folder / "plan.json"
        plan.write_text(encoded(self.kills), encoding="utf-8")
        command = ["recipes/quickstart.yaml", *settings(self.folder, **self.changes)]
        options = ["--local"] if self.is_local else []
        while True:
            before = len(self.killed)
            how = "healed" if self.heals_between else "any"
            status = self._until_its_end([str(plan), str(before), how, "train", *command, *options])
            new = self.killed[before:]
            if not any(kill["role"] == Role.DRIVER for kill in new):
                return status
            assert self.run is not None, self.told()
            command = ["--resume", str(self.run)]

    def told(self) -> str:
        """What the processes said."""
        return "".join(self.output)

    def _until_its_end(self, arguments: Sequence[str]) -> int:
        with subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.target", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as self.process:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                self._hear(line)
        return self.process.returncode

    def _hear(self, line: str) -> None:
        self.output.append(line)
        if line.startswith(FOLDER):
            self.run = Path(line.removeprefix(FOLDER).strip())
        elif line.startswith(ANNOUNCED):
            killed = json.loads(line.removeprefix(ANNOUNCED))
            self.killed.append(killed)
            self.on_kill(killed)
        else:
            self.on_line(line)


def whole_ledger(run: Path) -> Ledger:
    """The ledger of a finished run; fails unless all of it holds and every step is there once."""
    recipe = recipe_of_run(run)
    found = diagnosed(run, recipe)
    assert found.state is RunState.FINISHED, found
    assert found.ledger is not None
    assert not found.ledger.problems, found.ledger.line()
    assert found.ledger.num_pending == 0, found.ledger.line()
    assert found.ledger.num_trained == recipe.steps * recipe.sampled_per_step, found.ledger.line()
    assert list(logged_steps(run)) == list(range(1, recipe.steps + 1))
    return found.ledger


def logged_steps(run: Path) -> Iterator[int]:
    """The steps of metrics.jsonl, in its order; evaluations and checkpoints have other lines."""
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "reward" in record:
            yield record["step"]
