"""The process that holds a preference model for a scorer; see reward_services/function_child.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reward_services.function_child import Judged, serve
from reward_services.preference.model import loaded_model


def main(folder: str, options: str) -> None:
    """Load the model of a folder, then judge batches until the input ends."""

    def load() -> Judged:
        return loaded_model(Path(folder), **json.loads(options)).verdicts

    serve(load)


if __name__ == "__main__":
    main(*sys.argv[1:])
