"""`covey --version`: the software that a run here would use."""

from __future__ import annotations

from collections.abc import Sequence

from orchestration.commands.output import say_rows
from orchestration.versions import software_versions


def run(arguments: Sequence[str]) -> int:
    """Print one line per package."""
    say_rows(list(software_versions().items()))
    return 0
