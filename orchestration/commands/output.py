"""Where commands write: results to standard output, remarks to standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(text: str) -> None:
    """One line of result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def remark(text: str) -> None:
    """One line that is not part of the result, so that `--json` can be piped."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say_rows(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Columns side by side; the last one is not padded."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        say((indent + "  ".join([*cells, row[-1]])).rstrip())
