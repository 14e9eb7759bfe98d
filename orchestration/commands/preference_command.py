"""`covey preference`: the preference model of a WS-GRPO recipe, and the run that uses it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.commands.arguments import RECIPE_HELP, add_overrides, parsed
from orchestration.commands.output import remark, say, say_rows

if TYPE_CHECKING:
    from orchestration.preference_phase import PreferenceParts
    from reward_services.preference.training import PreferenceReport

ACTIONS = {
    "collect": "answer training prompts with the recipe's model and label the answers",
    "train": "train the preference model; collects first where there are no answers",
    "eval": "measure it on new answers to the recipe's evaluation prompts",
    "run": "both phases: train where there is no preference model, then covey train RECIPE",
}


def run(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="covey preference",
        description="Preference models that score prefixes, from labels of whole answers alone.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for name, summary in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
        add_overrides(action)
        action.add_argument(
            "--local", action="store_true", help="with the small engine, without vLLM and Ray"
        )
        if name in ("train", "eval"):
            action.add_argument("--json", action="store_true", help="for programs")
    options = parsed(parser, arguments)
    return _done(options)


def _done(options: argparse.Namespace) -> int:
    # Loaded here, as `covey preference --help` must not wait for them.
    from orchestration import preference_phase
    from orchestration.commands import train_command
    from orchestration.config import load_recipe
    from orchestration.roles import local_recipe

    recipe = load_recipe(options.recipe, options.set)
    parts = preference_phase.preference_parts(local_recipe(recipe) if options.local else recipe)
    if options.action == "eval":
        return _shown(preference_phase.evaluate(parts, remark), as_json=options.json)
    if options.action == "run":
        if not preference_phase.is_trained(parts):
            _train(parts, as_json=False)
        overrides = [word for override in options.set for word in ("--set", override)]
        local = ["--local"] if options.local else []
        return train_command.run([options.recipe, *overrides, *local])
    if options.action == "collect":
        _collect(parts)
        return 0
    return _train(parts, as_json=options.json)


def _collect(parts: PreferenceParts) -> None:
    from orchestration.preference_phase import collect

    found = collect(parts, remark)
    remark(
        f"{parts.folder}: {found.num_rollouts} answers to {found.num_questions} prompts, "
        f"{found.num_right} of them right"
        + (f"; {found.num_dropped} prompts were dropped" if found.num_dropped else "")
    )


def _train(parts: PreferenceParts, *, as_json: bool) -> int:
    from orchestration.preference_phase import is_collected, train

    if not is_collected(parts):
        _collect(parts)
    return _shown(train(parts, remark), as_json=as_json)


def _shown(report: PreferenceReport, *, as_json: bool) -> int:
    if as_json:
        say(json.dumps(report.as_json(), indent=2))
        return 0
    say(f"held-out pairs     {report.num_pairs} of {report.num_questions} prompts")
    say(f"pair accuracy      {report.pair_accuracy:.3f}  (chance: 0.5)")
    say(f"log loss           {report.log_loss:.3f}  (chance: 0.693)")
    say(f"calibration error  {report.calibration_error:.3f}")
    rows = [(f"{b.confidence:.2f}", f"{b.accuracy:.2f}", str(b.num_pairs)) for b in report.bins]
    say_rows([("confidence", "accuracy", "pairs"), *rows], indent="  ")
    return 0
