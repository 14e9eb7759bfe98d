"""`covey train`: check a recipe, then run it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.arguments import RECIPE_HELP, add_overrides, parsed
from orchestration.commands.output import remark, say, say_rows

if TYPE_CHECKING:
    from orchestration.check import Finding

if TYPE_CHECKING:
    pass


def run(arguments: Sequence[str]) -> int:
    """Exit status of the run."""
    parser = argparse.ArgumentParser(prog="covey train", description="Run a recipe.")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=RECIPE_HELP)
    add_overrides(parser)
    parser.add_argument(
        "--local", action="store_true", help="everything in this process, without Ray"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, show what would run, and write nothing"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a run: its folder, a checkpoint or its name; RECIPE may be left out",
    )
    options = parsed(parser, arguments)
    recipe = options.recipe or _recipe_of(options.resume)
    if recipe is None and options.resume is not None:
        remark(f"--resume {options.resume}: there is no run folder of that path")
        return 2
    if recipe is None:
        parser.error("a RECIPE is needed, for example: covey train quickstart")
    resume = None if options.resume is None else Path(options.resume)
    return _train(recipe, options.set, options.local, options.dry_run, resume)


def _recipe_of(run: str | None) -> str | None:
    """A run folder keeps the recipe that it began with."""
    if run is None:
        return None
    path = Path(run)
    nearby = (
        path / "config.yaml",
        path.parent.parent / "config.yaml",  # of one of its checkpoints
        Path("runs") / path / "config.yaml",  # by name, in the usual folder
    )
    return next((str(file) for file in nearby if file.is_file()), None)


def _train(
    recipe: str, overrides: Sequence[str], local: bool, dry_run: bool, resume: Path | None
) -> int:
    # Loaded here, as `covey train --help` must not wait for them.
    from orchestration.check import checked
    from orchestration.config import read_recipe
    from orchestration.plan import planned

    loaded = read_recipe(recipe, overrides)
    for notice in loaded.notices:
        remark(notice)
    findings = checked(loaded.recipe, local=local)
    if not _all_fine(findings, show_all=dry_run):
        return 2
    if dry_run:
        say_rows(planned(loaded.recipe, local=local))
        return 0
    # By name: it loads Ray, vLLM and torch.
    launch = importlib.import_module("orchestration.launch")
    status: int = launch.train(loaded.recipe, local=local, resume=resume)
    return status


def _all_fine(findings: Iterable[Finding], *, show_all: bool) -> bool:
    fine = True
    for finding in findings:
        fine = fine and finding.ok
        if not finding.ok:
            remark(finding.line())
        elif show_all:
            say(finding.line())
    return fine
