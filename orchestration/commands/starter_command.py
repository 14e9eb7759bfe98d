"""`covey starter`: the small model and the arithmetic problems that the quickstart runs on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.output import remark, say

if TYPE_CHECKING:
    from orchestration.starter.training import TrainingProgress

DATA_FOLDER = Path("data/starter")  # where recipes/quickstart.yaml looks
SHOW_EVERY_STEPS = 50


def run(arguments: Sequence[str]) -> int:
    """Write the data sets, or train the model from nothing."""
    parser = argparse.ArgumentParser(prog="covey starter", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|data")
    data = actions.add_parser("data", help="write train.jsonl and heldout.jsonl")
    data.add_argument("--out", type=Path, default=DATA_FOLDER, help=f"default: {DATA_FOLDER}")
    data.add_argument("--train", type=_count, default=8000, help="training problems (8000)")
    data.add_argument("--heldout", type=_count, default=200, help="held-out problems (200)")
    build = actions.add_parser("build", help="train the base model; minutes on two cores")
    build.add_argument("--out", type=Path, default=None, help="default: the shipped model")
    build.add_argument("--steps", type=_count, default=None, help="training steps")
    for action in (data, build):
        action.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return _data(options) if options.action == "data" else _build(options)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}; expected at least 1")
    return value


def _data(options: argparse.Namespace) -> int:
    from orchestration.starter.data import write_datasets

    written = write_datasets(
        options.out, num_train=options.train, num_heldout=options.heldout, seed=options.seed
    )
    say(f"{written.train}  {written.num_train} problems")
    say(f"{written.heldout}  {written.num_heldout} problems")
    return 0


def _build(options: argparse.Namespace) -> int:
    from orchestration.starter.build import DEFAULT_STEPS, build_starter, shipped_model_dir

    report = build_starter(
        options.out or shipped_model_dir(),
        seed=options.seed,
        num_steps=options.steps or DEFAULT_STEPS,
        on_progress=_show,
    )
    say(f"{report.model_dir}  {report.num_parameters} parameters, {report.training_s:.0f} s")
    return 0


def _show(progress: TrainingProgress) -> None:
    if progress.step % SHOW_EVERY_STEPS == 0 or progress.step == progress.num_steps:
        remark(f"step {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}")
