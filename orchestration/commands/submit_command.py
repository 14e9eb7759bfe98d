"""`covey submit`: the same run as a job on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestration.commands.arguments import parsed, recipe_parser

STOPPED_FOLLOWING = 130  # as a shell says it; covey has three statuses only


def run(arguments: Sequence[str]) -> int:
    """0: submitted, or with --follow: the job's own exit status."""
    parser = recipe_parser("submit", "Run a recipe on a Ray cluster, from this folder.")
    parser.add_argument(
        "--address", metavar="URL", help="of the cluster's dashboard: http://HOST:8265"
    )
    parser.add_argument("--follow", action="store_true", help="show the job's log until it ends")
    options = parsed(parser, arguments)

    from orchestration.config import found_recipe
    from orchestration.submit import submit

    status = submit(
        found_recipe(Path(options.recipe)),
        options.set,
        address=options.address,
        follow=options.follow,
        write=_write,
        working_dir=Path.cwd(),
    )
    return 1 if status == STOPPED_FOLLOWING else status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
