"""`covey scale`: how large the pools of a running job are, and other sizes for them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.commands.output import say, say_rows

if TYPE_CHECKING:
    from orchestration.scaling import PoolsRecord, Sizes

EVERY_S = 0.5


def run(arguments: Sequence[str]) -> int:
    """0: shown, or the sizes are in force (with --no-wait: asked for)."""
    options = _parser().parse_args(arguments)

    from grpo.errors import UserError
    from orchestration.found_run import found_run, recipe_of_run
    from orchestration.scaling import LOCAL, ask, in_words, parsed_sizes, read_pools

    folder = found_run(options.run)
    recipe = recipe_of_run(folder)
    sizes = parsed_sizes(options.sizes, recipe)
    _require_running(folder)
    pools = read_pools(folder)
    if not sizes:
        _show(folder, pools)
        return 0
    if pools is not None and not pools.can_scale:
        raise UserError(f"{folder.name}: {LOCAL}")
    ask(folder, sizes)
    if options.no_wait:
        say(f"asked for {in_words(sizes)}; `covey scale {options.run}` shows how far it is")
        return 0
    _follow(folder, sizes)
    say(f"in force: {in_words(sizes)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="covey scale",
        description="Show how many rollout workers, scorer actors and learner ranks a running job "
        "has, or give it other numbers while it goes on. New workers load the current weights "
        "before they serve; leaving ones finish what they have. The learner restarts at a "
        "checkpoint. A later --resume begins with the numbers that were last asked for.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or its name in runs/")
    parser.add_argument(
        "sizes",
        metavar="ROLE=N",
        nargs="*",
        help="rollout=4 (workers), SCORER=2 (actors, by the scorer's name), learner=2 (ranks)",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="do not wait until the numbers are in force"
    )
    return parser


def _require_running(folder: Path) -> None:
    from grpo.errors import UserError
    from orchestration.doctor import RunState, state_of

    state = state_of(folder)
    if state is not RunState.RUNNING:
        raise UserError(
            f"{folder.name} is not running ({state}), so there is nothing to scale: "
            f"`covey train --resume {folder}` continues it, if it has steps left"
        )


def _show(folder: Path, pools: PoolsRecord | None) -> None:
    if pools is None:
        say(f"{folder.name} is still starting its workers")
        return
    rows = [("role", "wanted", "ready", "starting", "leaving")]
    rows += [
        (role, str(found.wanted), str(found.ready), str(found.starting), str(found.leaving))
        for role, found in pools.pools.items()
    ]
    say_rows(rows)
    if pools.refusal is not None:
        say(f"the last request was refused: {pools.refusal}")


def _follow(folder: Path, sizes: Sizes) -> None:
    """Until the sizes are in force; an error if they will not be."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        _until_in_force(folder, sizes, _Lines())
        return
    with console.status("waiting for the run to hear it") as status:
        _until_in_force(folder, sizes, status.update)


class _Lines:
    """Each state once, with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            say(f"[{time.monotonic() - self._began:7.1f} s] {text}")
            self._last = text


def _until_in_force(folder: Path, sizes: Sizes, show: Callable[[str], None]) -> None:
    from grpo.errors import UserError
    from orchestration.scaling import pools_in_words, read_pools, read_request

    while True:
        pools, request = read_pools(folder), read_request(folder)
        if pools is None or request is None or pools.request != request.id:
            show("waiting for the run to hear it")
        elif pools.refusal is not None:
            raise UserError(pools.refusal)
        else:
            found = {role: pools.pools[role] for role in sizes}
            if other := {r: p.wanted for r, p in found.items() if p.wanted != sizes[r]}:
                raise UserError(f"somebody has asked for other numbers meanwhile: {other}")
            show(pools_in_words(found))
            if all(p.ready == p.wanted and not p.starting + p.leaving for p in found.values()):
                return
        _require_running(folder)
        time.sleep(EVERY_S)
