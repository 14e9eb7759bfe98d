"""`covey replay`: a recorded step once more, and whether it comes out the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.commands.output import remark, say, say_rows

if TYPE_CHECKING:
    from orchestration.config import Recipe
    from orchestration.faulty_token import FaultyToken
    from orchestration.recompute import Comparison, RecordedStep

# What is always shown; of the other figures those that differ.
SHOWN = ("loss", "grad_norm", "log_prob_gap/mean", "log_prob_gap/max", "log_prob_gap/kl")


def run(arguments: Sequence[str]) -> int:
    """0: bit for bit equal, 1: something differs."""
    options = _parser().parse_args(arguments)

    from orchestration.found_run import found_run, recipe_of_run
    from orchestration.recompute import explanation, recorded_step
    from orchestration.run_directory import version_changes
    from orchestration.versions import software_versions

    folder = found_run(options.run)
    recipe = recipe_of_run(folder)
    wanted = recorded_step(folder, options.step)
    changes = version_changes(folder, software_versions())
    for change in changes:
        remark(f"software changes since this run began: {change}")
    found = _recomputed(wanted, recipe)
    faulty = _faulty(found[-1], recipe)
    is_equal = not any(item.differing for item in found)
    reasons = list(explanation(wanted, found))
    if options.json:
        say(json.dumps(_record(wanted, found, faulty, reasons, changes), indent=2))
    else:
        _show(wanted, found, faulty, reasons)
    return 0 if is_equal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="covey replay",
        description="Recompute a step of a run from the checkpoint before it and the batches that "
        "were recorded since, and compare it with what was recorded, bit for bit.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or its name in runs/")
    parser.add_argument("step", metavar="STEP", type=int, help="a step that is in RUN/batches")
    parser.add_argument("--json", action="store_true", help="for programs: all figures")
    return parser


def _recomputed(wanted: RecordedStep, recipe: Recipe) -> list[Comparison]:
    import asyncio

    from rich.console import Console

    from orchestration.display import Display
    from orchestration.recompute import recipe_then, recomputed
    from orchestration.roles import started_learner

    recipe = recipe_then(recipe, wanted)

    async def main(display: Display) -> list[Comparison]:
        async with started_learner(recipe, on_phase=display.phase) as learner:
            display.phase(f"recomputing from {wanted.start} to step {wanted.step}")
            return await recomputed(
                wanted,
                learner,
                lambda item: display.step(
                    item.recomputed.metrics or {}, item.batch.step, wanted.step
                ),
            )

    # On standard error: the result can be piped.
    with Display.open(Console(stderr=True)) as display:
        return asyncio.run(main(display))


def _faulty(last: Comparison, recipe: Recipe) -> FaultyToken | None:
    """The token that the failure of the step names, as it is now or was in the run."""
    place = last.recomputed.place or last.recorded.place
    if place is None:
        return None
    from orchestration.faulty_token import faulty_token
    from rollout_workers.tokenization import Tokenization

    return faulty_token(last.batch, place, Tokenization(recipe.model))


def _show(
    wanted: RecordedStep,
    found: Sequence[Comparison],
    faulty: FaultyToken | None,
    reasons: Sequence[str],
) -> None:
    last_step = [item for item in found if item.batch.step == found[-1].batch.step]
    for item in last_step:
        say(f"step {item.batch.step}{', stage' if item.batch.is_stage else ''}")
        if rows := _rows(item):
            say_rows([("", "recorded", "recomputed", ""), *rows], indent="  ")
        for name, outcome in (("recorded", item.recorded), ("recomputed", item.recomputed)):
            if outcome.error is not None:
                say(f"  {name}: {outcome.error}")
    if faulty is not None:
        _show_faulty(faulty)
    steps = f"step {wanted.step} from {wanted.start}"
    if not reasons and found[-1].recorded.error is not None:
        say(f"fails as it did in the run: {steps}; all figures before it are bit for bit equal")
        return
    if not reasons:
        say(f"bit for bit equal: {steps}, every figure of {len(found)} batches")
        return
    say(f"NOT equal: {steps}")
    for reason in reasons:
        say(f"  {reason}")


def _rows(item: Comparison) -> list[tuple[str, str, str, str]]:
    ours, theirs = item.recorded.metrics or {}, item.recomputed.metrics or {}
    names = [name for name in SHOWN if name in ours or name in theirs]
    names += [name for name in item.differing if name not in names and name != "error"]
    return [
        (
            name,
            repr(ours[name]) if name in ours else "-",
            repr(theirs[name]) if name in theirs else "-",
            "differs" if name in item.differing else "equal",
        )
        for name in names
    ]


def _show_faulty(faulty: FaultyToken) -> None:
    say(f"  token {faulty.token} of rollout {faulty.rollout} of group {faulty.group}")
    say(f"    context     {faulty.context!r}")
    say(f"    completion  {faulty.completion!r}")
    head = ("", "token", "id", "text", "origin", "version", "weight", "advantage")
    rows = [
        (
            ">" if given.token == faulty.token else "",
            str(given.token),
            str(given.id),
            repr(given.text),
            given.origin,
            str(given.version),
            f"{given.weight:.6g}",
            f"{given.advantage:.6g}",
            f"{given.policy_weight:.6g}",
            f"{given.behaviour_log_prob:.6g}",
        )
        for given in faulty.nearby
    ]
    say_rows([(*head, "policy weight", "engine's log-prob"), *rows], indent="    ")


def _record(
    wanted: RecordedStep,
    found: Sequence[Comparison],
    faulty: FaultyToken | None,
    reasons: Sequence[str],
    changes: Sequence[str],
) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "run": str(wanted.run),
        "step": wanted.step,
        "start": wanted.start,
        "is_equal": not reasons,
        "reasons": list(reasons),
        "software_changes": list(changes),
        "batches": [
            {
                "step": item.batch.step,
                "is_stage": item.batch.is_stage,
                "differing": item.differing,
                "recorded": asdict(item.recorded),
                "recomputed": asdict(item.recomputed),
            }
            for item in found
        ],
        "faulty_token": None if faulty is None else asdict(faulty),
    }
