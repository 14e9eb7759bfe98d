"""`covey export`: the model of a checkpoint as a folder of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from orchestration.commands.output import remark, say


def run(arguments: Sequence[str]) -> int:
    """0: DIR holds the model."""
    parser = argparse.ArgumentParser(
        prog="covey export",
        description="Copy the model of a checkpoint: AutoModelForCausalLM, AutoTokenizer and vLLM "
        "load the folder. covey_origin.json in it says where it came from.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or its name in runs/")
    parser.add_argument("step", metavar="STEP", help="a number, latest or best")
    parser.add_argument("target", metavar="DIR", type=Path, help="a new or an empty folder")
    parser.add_argument("--force", action="store_true", help="replace the model that DIR holds")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="the adapter alone, of a run with learner.lora: peft and vLLM load the folder",
    )
    parser.add_argument("--json", action="store_true", help="print where it came from, as JSON")
    options = parser.parse_args(arguments)

    # Loaded here, as `covey export --help` must not wait for it.
    from dataclasses import asdict

    from orchestration.export import export_model

    target = options.target.absolute()
    origin = export_model(
        options.run,
        options.step,
        target,
        force=options.force,
        adapter=options.adapter,
        remark=remark,
    )
    if options.json:
        say(json.dumps({"path": str(target), **asdict(origin)}, indent=2))
    else:
        say(f"step {origin.step} of {origin.run}: {target}")
    return 0
