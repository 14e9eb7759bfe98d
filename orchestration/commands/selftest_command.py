"""`covey selftest`: does a recipe's engine hold what its learner trains?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.commands.arguments import parsed, recipe_parser
from orchestration.commands.output import remark, say

if TYPE_CHECKING:
    from orchestration.config import Recipe
    from orchestration.selftest import SelftestReport, SelftestStep

SUMMARY = (
    "Train at learning rate 0 with the engine and the learner of a recipe: sample, train, publish, "
    "load, again and again. Weights and log-probability difference must stay where they are."
)


def run(arguments: Sequence[str]) -> int:
    """0: nothing moved, 1: something did."""
    options = parsed(_parser(), arguments)

    from orchestration.check import checked
    from orchestration.config import read_recipe
    from orchestration.roles import local_recipe
    from orchestration.selftest import selftest_recipe

    loaded = read_recipe(options.recipe, options.set)
    for notice in loaded.notices:
        remark(notice)
    recipe = selftest_recipe(local_recipe(loaded.recipe) if options.local else loaded.recipe)
    problems = [found for found in checked(recipe, local=options.local) if not found.ok]
    for problem in problems:
        remark(problem.line())
    if problems:
        return 2
    report = _report(recipe, options.steps, is_local=options.local)
    if options.json:
        say(json.dumps(_record(report), indent=2))
    else:
        _show(report)
    return 0 if report.has_passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser("selftest", SUMMARY)
    parser.add_argument("--steps", type=_count, default=10, help="how often (10)")
    parser.add_argument(
        "--local", action="store_true", help="everything in this process, without Ray"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}; expected at least 1")
    return value


def _report(recipe: Recipe, steps: int, *, is_local: bool) -> SelftestReport:
    import asyncio

    from rich.console import Console

    from orchestration.display import Display
    from orchestration.roles import started_roles
    from orchestration.run_inputs import planned_order
    from orchestration.selftest import selftest, selftest_requests
    from orchestration.waits import Waits
    from rollout_workers.tokenization import Tokenization

    prompts = planned_order(recipe, Tokenization(recipe.model))
    requests = selftest_requests(recipe, prompts.at)

    async def main(display: Display) -> SelftestReport:
        def on_step(step: SelftestStep) -> None:
            display.message(_line(step, steps))
            if console.is_terminal:  # the bar and the time left; elsewhere the line says it all
                display.step({}, step.step, steps)

        async with started_roles(
            recipe, local=is_local, waits=Waits(), on_phase=display.phase
        ) as roles:
            display.phase("training at rate 0")
            return await selftest(
                recipe, roles.engine, roles.learner, requests, steps=steps, on_step=on_step
            )

    console = Console(stderr=True)  # so that the result can be piped
    with Display.open(console) as display:
        return asyncio.run(main(display))


def _line(step: SelftestStep, steps: int) -> str:
    gap = step.gap
    return (
        f"step {step.step}/{steps}  difference: mean {gap.mean:.2e}  max {gap.max:.2e}  KL "
        f"{gap.kl:.2e}  ({gap.num_tokens} tokens)  weights {step.checksum:016x}  rollouts as in "
        f"step 1: {step.num_equal}/{step.num_rollouts}"
    )


def _show(report: SelftestReport) -> None:
    after, count = report.after, len(report.steps)
    say(f"after {count} steps: mean {after.mean:.2e}  max {after.max:.2e}  KL {after.kl:.2e}")
    if report.has_passed:
        say(f"passed: {count} steps left the weights and the difference where they were")
        return
    say("FAILED")
    for reason in report.moved:
        say(f"  {reason}")


def _record(report: SelftestReport) -> dict[str, object]:
    from dataclasses import asdict

    return {"passed": report.has_passed, **asdict(report)}
