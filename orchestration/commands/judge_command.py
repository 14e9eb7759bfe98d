"""`covey judge`: a small model that judges steps, trained and measured on the starter problems."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.output import remark, say

if TYPE_CHECKING:
    from orchestration.starter.judge_build import Agreement
    from orchestration.starter.training import TrainingProgress

FOLDER = Path("models/judge")  # where recipes/sgpo_judge.yaml looks
SHOW_EVERY_STEPS = 50


def run(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="covey judge", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|eval")
    train = actions.add_parser(
        "train", help="train it from the starter model; minutes on two cores"
    )
    train.add_argument("--out", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    train.add_argument("--steps", type=_count, default=None, help="training steps")
    train.add_argument(
        "--withhold-reference", action="store_true", help="a judge that sees no reference solution"
    )
    measure = actions.add_parser("eval", help="compare it with the rule, on wrong answers")
    measure.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default: {FOLDER}")
    measure.add_argument("--answers", type=_count, default=200, help="wrong answers (200)")
    measure.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    for action in (train, measure):
        action.add_argument("--seed", type=int, default=0)
        action.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    return _train(options) if options.action == "train" else _evaluate(options)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}; expected at least 1")
    return value


def _train(options: argparse.Namespace) -> int:
    # Loaded here, as `covey judge --help` must not wait for torch.
    from orchestration.starter.judge_build import DEFAULT_STEPS, build_judge

    report = build_judge(
        options.out,
        seed=options.seed,
        num_steps=options.steps or DEFAULT_STEPS,
        with_reference=not options.withhold_reference,
        on_progress=_Progress(),
    )
    if options.json:
        say(json.dumps(report.as_json(), indent=2))
        return 0
    say(f"{report.model_dir}  {report.num_parameters} parameters, {report.training_s:.0f} s")
    _say_agreement(report.agreement, "held-out answers")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from orchestration.starter.judge_eval import evaluate_judge

    found = evaluate_judge(
        options.folder, engine=options.engine, num_answers=options.answers, seed=options.seed
    )
    if options.json:
        say(json.dumps(found.as_json(), indent=2))
        return 0
    _say_agreement(found.agreement, "wrong answers")
    say(f"unreadable replies {found.num_unreadable_replies}")
    say(f"without a score    {found.num_unscored}")
    say(f"speed              {found.answers_per_s:.0f} answers/s")
    return 0


def _say_agreement(found: Agreement, what: str) -> None:
    say(f"{what:18} {found.num_answers}, {found.num_wrong_steps} of them with a wrong step")
    say(f"same first error   {found.exact:.3f}  (never finding any: {found.always_none:.3f})")
    say(f"  with wrong step  {found.exact_wrong:.3f}")
    say(f"  off by one       {found.off_by_one:.3f}")


class _Progress:
    """Says where the training is and how long the rest will take."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, progress: TrainingProgress) -> None:
        if progress.step % SHOW_EVERY_STEPS and progress.step != progress.num_steps:
            return
        seconds = time.monotonic() - self._started
        rest = seconds / progress.step * (progress.num_steps - progress.step)
        remark(
            f"step {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}  "
            f"{seconds:.0f} s, {rest:.0f} s left"
        )
