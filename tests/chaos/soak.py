"""Kills at random in one long run, and the ledger after each of them: `make soak`.

    python -m tests.chaos.soak --minutes 15 --seed 7

One line for each kill, and a closing one with the counts and the ledger. A seed repeats the plan:
which role, in which phase, how far into it. Exit status 1, with the run's folder, if anything
is wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from orchestration.checkpoint import DriverState, latest_checkpoint, read_driver_state
from orchestration.config import Recipe
from orchestration.doctor import RunState, diagnosed
from orchestration.found_run import recipe_of_run
from orchestration.ledger import Ledger, audited, read_entries
from orchestration.prompt_order import PromptOrder
from orchestration.run_directory import GROUPS_FILE
from orchestration.run_inputs import planned_order
from rollout_workers.tokenization import Tokenization
from tests.chaos.attacked import SMALL, Attack, logged_steps
from tests.chaos.plan import Role, some_random_kills

ROLES = (Role.ROLLOUT, Role.SCORER, Role.LEARNER, Role.DRIVER)
MOST_KILLS = 100_000
STEPS = 1_000_000  # more than any soak has time for


class Soak:
    """A run that is shot at for a while."""

    def __init__(self, folder: Path, *, minutes: float, seed: int, roles: Sequence[Role]) -> None:
        self._minutes = minutes
        self._until: float | None = None  # counted from the first step on
        self._started = time.monotonic()
        self._order: PromptOrder | None = None
        self.problems: list[str] = []
        self._attack = Attack(
            folder=folder,
            kills=some_random_kills(seed, roles, MOST_KILLS),
            changes={**SMALL, "steps": STEPS, "max_staleness": 1},
            heals_between=False,
            on_kill=self._killed,
            on_line=self._line,
        )

    @property
    def num_kills(self) -> int:
        """So far."""
        return len(self._attack.killed)

    def run(self) -> bool:
        """True if nothing was wrong."""
        status = self._attack.carry_on()
        run = self._attack.run
        if run is None:
            say(self._attack.told())
            return False
        recipe = recipe_of_run(run)
        found = diagnosed(run, recipe)
        # It was asked to stop, which ends in a checkpoint.
        if status != 1 or found.state is not RunState.INTERRUPTED:
            self.problems.append(f"the run is {found.state} with exit status {status}")
        steps = list(logged_steps(run))
        if steps != list(range(1, len(steps) + 1)):
            self.problems.append("metrics.jsonl does not hold every step once")
        if found.ledger is None:
            self.problems.append("there is no ledger")
        else:
            self.problems += found.ledger.problems
        self._close(len(steps), found.ledger)
        return not self.problems

    def _line(self, line: str) -> None:
        """Ask the run to stop when the time is over."""
        if not line.startswith("step "):
            return
        if self._until is None:
            self._until = time.monotonic() + 60 * self._minutes
        process = self._attack.process
        if time.monotonic() > self._until and process is not None:
            self._until = float("inf")
            process.send_signal(signal.SIGINT)

    def _killed(self, killed: dict[str, object]) -> None:
        ledger = self._ledger_now()
        say(
            f"{time.monotonic() - self._started:7.1f} s  {killed['role']!s:15}"
            f"{killed['phase']!s:15}step {killed['step']!s:6}"
            f"{'no checkpoint yet' if ledger is None else ledger.line()}"
        )
        if ledger is not None and ledger.problems:
            self.problems += ledger.problems

    def _ledger_now(self) -> Ledger | None:
        """Of the files as they are; the run may be writing on."""
        run = self._attack.run
        assert run is not None
        recipe = recipe_of_run(run)
        saved = newest_state(run)
        if saved is None:
            return None
        if self._order is None:
            self._order = planned_order(recipe, Tokenization(recipe.model))
        return ledger_of(run, recipe, saved, self._order)

    def _close(self, num_steps: int, ledger: Ledger | None) -> None:
        minutes = (time.monotonic() - self._started) / 60
        by_role = Counter(str(kill["role"]) for kill in self._attack.killed)
        told = ", ".join(f"{count} {role}" for role, count in sorted(by_role.items()))
        say(
            f"{len(self._attack.killed)} kills ({told}) in {minutes:.1f} minutes and "
            f"{num_steps} steps; {'' if ledger is None else ledger.line()}"
        )


def newest_state(run: Path) -> DriverState | None:
    """Of the latest checkpoint. A newer one may take its place, and its folder away, meanwhile."""
    while True:
        try:
            folder = latest_checkpoint(run)
            return None if folder is None else read_driver_state(folder)
        except FileNotFoundError:
            continue


def ledger_of(run: Path, recipe: Recipe, saved: DriverState, order: PromptOrder) -> Ledger:
    """What groups.jsonl holds is never older than the checkpoint, which was read before it."""
    return audited(
        read_entries(run / GROUPS_FILE),
        saved,
        window=recipe.window,
        planned=lambda group: order.at(group).id,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the ledger held to the end."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=None, help="repeats a plan; else a new one")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    say(f"seed {seed}: `make soak SOAK_SEED={seed}` repeats this plan")
    folder = Path(tempfile.mkdtemp(prefix="covey-soak-"))
    soak = Soak(folder, minutes=options.minutes, seed=seed, roles=ROLES)
    if soak.run():
        return 0
    for problem in soak.problems:
        say(f"WRONG: {problem}")
    say(f"the run: {folder}")
    return 1


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
