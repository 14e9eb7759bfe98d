"""`covey` in this process, with a hook around its waits that kills processes by a plan.

    python -m tests.chaos.target PLAN.json NUM_DONE healed|any train RECIPE ...

healed: the run waits before a step until the next kill finds a worker that serves; any: workers
are killed while they start, too.

Nothing in the product knows of this: phases are recognised by the names of its waits, processes
found by the whereabouts that it keeps. Before each kill a line `killed {...}` goes to standard
output, which outlives this process. Refuses to know what a run must look like afterwards.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from orchestration import cli, training_step
from orchestration.buffer import GroupBuffer
from orchestration.checkpoint import whole_steps
from orchestration.journal import RunJournal
from orchestration.waits import Waits
from tests.chaos.plan import Kill, Phase, Role, decoded

ANNOUNCED = "killed "
HEALING_POLL_S = 0.05
# (owner of the wait begins so, what was asked begins so)
PHASES = {
    Phase.GENERATION: ("rollout worker ", "sampling "),
    Phase.SCORING: ("scorer ", "scoring "),
    Phase.OPTIMISER: ("learner", "step "),
    Phase.PUBLISH: ("learner", "publishing "),
    Phase.LOAD: ("rollout worker ", "loading version "),
    Phase.CHECKPOINT: ("learner", ("copying its state", "writing ")),
}


class Shots:
    """The kills that are still to come, one after the other, a step of training between them."""

    def __init__(self, kills: Sequence[Kill], *, num_done: int, only_serving: bool) -> None:
        self._kills = list(kills)
        self._only_serving = only_serving
        self._next = num_done
        self._waits: Waits | None = None
        self._step = 0
        self._is_armed = False  # a step was trained since the last kill
        self._took_s: dict[Phase, float] = {}

    def watch(self, waits: Waits) -> None:
        """These know where the processes are."""
        self._waits = waits

    def trained(self, step: int, *, is_saved: bool) -> None:
        """A step was done; the first kill alone may come before there is a checkpoint."""
        self._step, self._is_armed = step, is_saved or self._next == 0

    @contextmanager
    def during(self, phase: Phase, owner: str = "") -> Iterator[None]:
        """The phase begins and ends; the next kill, if it is for this one, falls into it."""
        kill = self._due(phase)
        victim = None if kill is None else self._victim(kill, owner)
        if kill is not None and victim is not None:
            self._is_armed = False
            self._next += 1
            after_s = kill.fraction * self._took_s.get(phase, 0.0)
            self._fire(kill, *victim, after_s=after_s)
        began = time.monotonic()
        yield
        self._took_s[phase] = time.monotonic() - began

    def _due(self, phase: Phase) -> Kill | None:
        if not self._is_armed or self._next >= len(self._kills):
            return None
        kill = self._kills[self._next]
        return kill if kill.phase is phase else None

    def has_victim(self) -> bool:
        """Whether the next kill would find a process that serves."""
        return (
            self._next >= len(self._kills) or self._victim(self._kills[self._next], "") is not None
        )

    def _victim(self, kill: Kill, owner: str) -> tuple[str, int] | None:
        """(owner, process): the one whose phase this is, if it is of the role; else any of it."""
        if kill.role is Role.DRIVER:
            return "driver", os.getpid()
        # A node is named by a rollout worker on it.
        prefix = Role.ROLLOUT if kill.role is Role.NODE else kill.role
        serving = self._serving(prefix)
        if kill.role is Role.NODE:
            serving = {owner: pid for owner, pid in serving.items() if _can_be_lost(pid)}
        if owner in serving:
            return owner, serving[owner]
        if not serving:
            return None
        return sorted(serving.items())[kill.choice % len(serving)]

    def _serving(self, prefix: str) -> dict[str, int]:
        assert self._waits is not None
        starting = {wait.owner for wait in self._waits.open if wait.asked.startswith("starting")}
        return {
            owner: place.pid
            for owner, place in self._waits.whereabouts.items()
            if owner.startswith(prefix)
            and not (self._only_serving and owner in starting)
            and psutil.pid_exists(place.pid)
        }

    def _fire(self, kill: Kill, owner: str, pid: int, *, after_s: float) -> None:
        pids = _node_of(pid) if kill.role is Role.NODE else [pid]
        found = {"role": kill.role, "phase": kill.phase, "step": self._step + 1, "owner": owner}

        def fire() -> None:
            os.write(1, f"{ANNOUNCED}{json.dumps(found)}\n".encode())
            for victim in pids:
                with suppress(ProcessLookupError):  # it went with the one before
                    os.kill(victim, signal.SIGKILL)

        if after_s > 0:
            timer = threading.Timer(after_s, fire)
            timer.daemon = True
            timer.start()
        else:
            fire()


def _raylet(worker: int) -> psutil.Process:
    """The process of Ray that a node is, as far as Ray is concerned."""
    raylet = psutil.Process(worker).parent()
    if raylet is None or "raylet" not in raylet.name():
        raise psutil.NoSuchProcess(worker, msg="its raylet is gone")
    return raylet


def _can_be_lost(worker: int) -> bool:
    """Whether it is on a node that still is there and is not the driver's."""
    try:
        return "--head" not in _raylet(worker).cmdline()
    except psutil.NoSuchProcess:
        return False  # it went meanwhile, or its node did


def _node_of(worker: int) -> list[int]:
    """The raylet that a worker belongs to, then everything that it has started."""
    raylet = _raylet(worker)
    return [raylet.pid, *[child.pid for child in raylet.children(recursive=True)]]


def phase_of(owner: str, asked: str) -> Phase | None:
    """The phase that a wait is a part of."""
    for phase, (whose, what) in PHASES.items():
        if owner.startswith(whose) and asked.startswith(what):
            return phase
    return None


def hook(shots: Shots, *, heals_between: bool) -> None:
    """Have the shots see what this process does."""
    opened = Waits._opened

    @contextmanager
    def watched(self: Waits, name: str, **options: Any) -> Iterator[Any]:
        shots.watch(self)
        owner, _, asked = name.partition(": ")
        phase = phase_of(owner, asked)
        with opened(self, name, **options) as wait:
            if phase is None:
                yield wait
            else:
                with shots.during(phase, owner):
                    yield wait

    admit, take = GroupBuffer.admit, GroupBuffer.take

    async def admitted(self: GroupBuffer[Any]) -> int:
        group = await admit(self)
        with shots.during(Phase.ADMISSION):
            return group

    async def taken(self: GroupBuffer[Any], count: int) -> list[Any]:
        while heals_between and not shots.has_victim():
            await asyncio.sleep(HEALING_POLL_S)
        return await take(self, count)

    build, trained = training_step.build_batch, RunJournal.trained

    def built(*arguments: Any, **named: Any) -> Any:
        with shots.during(Phase.BATCH):
            return build(*arguments, **named)

    def noted(self: RunJournal, step: Any) -> None:
        trained(self, step)
        shots.trained(step.step, is_saved=bool(whole_steps(self._run.path)))

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (Waits, "_opened", watched),
        (GroupBuffer, "admit", admitted),
        (GroupBuffer, "take", taken),
        (training_step, "build_batch", built),
        (RunJournal, "trained", noted),
    ]
    for place, name, replacement in patches:
        assert hasattr(place, name), f"{place} has no {name} any more"
        setattr(place, name, replacement)


def main() -> int:
    """Run the command line that follows the plan."""
    plan, num_done, how, *command = sys.argv[1:]
    assert how in ("healed", "any"), how
    kills = decoded(Path(plan).read_text(encoding="utf-8"))
    shots = Shots(kills, num_done=int(num_done), only_serving=how == "healed")
    hook(shots, heals_between=how == "healed")
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
