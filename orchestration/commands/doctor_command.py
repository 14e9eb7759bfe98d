"""`covey doctor`: what a run is doing, who waits for whom, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.commands.output import say

if TYPE_CHECKING:
    from orchestration.doctor import Diagnosis


def run(arguments: Sequence[str]) -> int:
    """0: healthy, 1: something is wrong."""
    options = _parser().parse_args(arguments)

    from orchestration.doctor import diagnosed
    from orchestration.found_run import found_run, recipe_of_run

    folder = found_run(options.run)
    found = diagnosed(folder, recipe_of_run(folder))
    if options.json:
        from dataclasses import asdict

        say(json.dumps({**asdict(found), "is_healthy": found.is_healthy}, indent=2))
    else:
        _show(found)
    return 0 if found.is_healthy else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="covey doctor",
        description="Look at the folder of a run, while it goes on or afterwards, and say in plain "
        "words what it is doing, who waits for whom, and what is wrong with it. Exit status: 0 "
        "healthy, 1 something is wrong, 2 no such run.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or its name in runs/")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _show(found: Diagnosis) -> None:
    say(f"{found.run}: {found.state}, step {found.step} of {found.planned_steps}")
    if found.last_line_s is not None:
        say(f"last record written {found.last_line_s:.0f} s ago")
    if found.pools is not None:
        say(f"workers: {found.pools}")
    for text in found.waits:
        say(f"  {text}")
    if found.closest is not None:
        say(f"closest to its deadline: {found.closest}")
    if found.ledger is not None:
        say(found.ledger.line())
    for text in found.remarks:
        say(f"({text})")
    for text in found.problems:
        say(f"WRONG: {text}")
    if found.is_healthy:
        say("nothing is wrong")
