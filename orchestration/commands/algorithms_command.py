"""`covey algorithms`: the members of the family."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from orchestration.commands.output import say, say_rows


def run(arguments: Sequence[str]) -> int:
    """One line, or one JSON record, per algorithm."""
    parser = argparse.ArgumentParser(prog="covey algorithms", description="List the algorithms.")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)

    from grpo.algorithms import ALGORITHMS

    if options.json:
        records = [
            {
                "name": a.name,
                "title": a.title,
                "paper": a.paper,
                "kind": a.kind,
                "certainty": a.certainty,
                "settings": a.config().model_dump(mode="json"),
            }
            for a in ALGORITHMS.values()
        ]
        say(json.dumps(records, indent=2))
    else:
        say_rows([(a.name, a.title, a.kind, a.certainty, a.paper) for a in ALGORITHMS.values()])
    return 0
