"""`covey simulate`: what limits a step, at any number of workers, without running one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orchestration.commands.arguments import parsed, recipe_parser
from orchestration.commands.output import remark, say, say_rows

if TYPE_CHECKING:
    from orchestration.recipe import Recipe
    from orchestration.simulation.report import SimulationReport
    from orchestration.simulation.services import Services

SUMMARY = (
    "Run the driver of a recipe against rollout workers, scorers and a learner that only wait, in "
    "simulated time: how long a step takes, who is busy, and what limits it. Service times are the "
    "recipe's `simulation` section, or those of a real run."
)
MOST_STEPS = 50  # unless --steps asks for more
MOST_WORKERS = 4096
LINES = 10  # of progress where there is no terminal


def run(arguments: Sequence[str]) -> int:
    """0: simulated; the errors are those that a run would end with."""
    options = parsed(_parser(), arguments)

    from orchestration.config import read_recipe
    from orchestration.simulation.services import services

    loaded = read_recipe(options.recipe, options.set, needs_files=False)
    for notice in loaded.notices:
        remark(notice)
    recipe = loaded.recipe
    steps = options.steps or min(recipe.steps, MOST_STEPS)
    rollout = recipe.rollout.model_copy(
        update={"workers": options.workers or recipe.rollout.workers}
    )
    recipe = recipe.model_copy(update={"steps": steps, "rollout": rollout})
    lengths = None
    if options.like is not None:
        recipe, lengths = _like(recipe, options.like)
    times = services(recipe, lengths)
    report = _report(recipe, times)
    if options.json:
        say(json.dumps(_record(report, recipe, times), indent=2))
    else:
        _show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser("simulate", SUMMARY)
    parser.add_argument(
        "--workers", type=_up_to(MOST_WORKERS), metavar="N", help="instead of rollout.workers"
    )
    parser.add_argument(
        "--steps",
        type=_up_to(1_000_000),
        metavar="N",
        help=f"instead of the recipe's, of which at most {MOST_STEPS} are simulated",
    )
    parser.add_argument(
        "--like",
        metavar="RUN",
        help="take lengths and service times from a run's folder, but for those that the recipe's "
        "`simulation` section or --set names",
    )
    parser.add_argument("--json", action="store_true", help="for programs: all figures")
    return parser


def _up_to(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"found {value}; expected 1 to {most}")
        return value

    return count


def _like(recipe: Recipe, run: str) -> tuple[Recipe, Sequence[Sequence[int]] | None]:
    """The recipe with what the run has measured, and the lengths of its completions."""
    from orchestration.found_run import found_run, recipe_of_run
    from orchestration.simulation.measured import measured

    folder = found_run(run)
    found = measured(folder, workers=recipe_of_run(folder).rollout.workers)
    given = recipe.simulation
    lengths = found.lengths_beside(given)
    filled = found.fill(given)
    remark(f"as measured in {folder}:")
    for name, value in found.settings.items():
        if name not in given.model_fields_set:
            remark(f"  simulation.{name}: {value:.6g}")
    return recipe.model_copy(update={"simulation": filled}), lengths


def _report(recipe: Recipe, times: Services) -> SimulationReport:
    from rich.console import Console

    from orchestration.display import Display
    from orchestration.simulation.run import simulated

    console = Console(stderr=True)  # so that the result can be piped
    every = -(-recipe.steps // LINES)
    shown = [(0, 0.0)]  # steps, and when they ended

    def on_step(step: int, now_s: float) -> None:
        if console.is_terminal:
            display.step({"timing_s/step": now_s / step}, step, recipe.steps)
        elif step % every == 0 or step == recipe.steps:
            before, then_s = shown[-1]
            mean_s = (now_s - then_s) / (step - before)
            display.message(f"step {step}/{recipe.steps}  {mean_s:.4g} s a step")
            shown.append((step, now_s))

    with Display.open(console) as display:
        display.phase(
            f"simulating {recipe.steps} steps with {recipe.rollout.workers} rollout workers"
        )
        return simulated(recipe, times, on_step)


def _show(found: SimulationReport) -> None:
    from orchestration.display import duration
    from orchestration.simulation.report import advice

    rows = [
        ("simulated", f"{found.steps} steps in {duration(found.wall_s)}"),
        ("step", f"{found.step_s:.4g} s, without the first {found.warm_up_steps}"),
        ("rollout workers", f"{found.workers}, busy {found.rollout_busy:.0%} of the time"),
        ("learner", f"busy {found.learner_busy:.0%}, waits {found.learner_waits_s:.4g} s a step"),
        (
            "asynchronous efficiency",
            f"{found.efficiency:.3f} = step / max(generation {found.generation_s:.4g} s, "
            f"learning {found.learning_s:.4g} s)",
        ),
        ("staleness", f"mean {found.staleness_mean:.2f}, max {found.staleness_max:g}"),
        ("scored groups wait", f"{found.group_waits_s:.4g} s for their step"),
        (
            "groups",
            f"{found.trained_groups} trained, {found.dropped_groups} dropped, "
            f"{found.unfinished_groups} under way at the end",
        ),
        *(
            (f"{role}: replaced", f"{count} times, for alarms.worker_s")
            for role, count in found.num_replaced.items()
        ),
        (
            "driver",
            f"{found.driver_us_per_rollout:.0f} us of CPU a rollout, "
            f"{found.rollouts_per_cpu_s:,.0f} rollouts/s on one core",
        ),
        ("peak memory", f"{found.peak_memory_mib:,.0f} MiB"),
    ]
    say_rows(rows)
    say(advice(found))


def _record(found: SimulationReport, recipe: Recipe, times: Services) -> dict[str, object]:
    from dataclasses import asdict

    from orchestration.simulation.report import advice

    derived = ("rollout_busy", "learner_busy", "efficiency", "learner_waits_s")
    driver = ("driver_us_per_rollout", "rollouts_per_cpu_s")
    given = asdict(times)
    del given["lengths"]
    return {
        **asdict(found),
        **{name: getattr(found, name) for name in (*derived, *driver)},
        "advice": advice(found),
        "services": given,
        "seed": recipe.seed,
    }
