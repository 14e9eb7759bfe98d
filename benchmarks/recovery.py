"""From SIGKILL of a rollout worker to a full pool that serves the current weights, through Ray.

    python -m benchmarks.recovery                                     both engines, 5 kills each
    python -m benchmarks.recovery --engines transformers --kills 9

Two real rollout workers with the starter model, busy all the time with groups of 8 rollouts; scorer
and learner are idle beside them. The clock runs from the kill until the new worker has answered
with the weights that were published after the start. Work lost: completion tokens that the killed
worker had sampled of the groups it was at, which others sample again. The process cannot be asked
any more: it is the time since the group was asked for over the time that it took elsewhere, of the
tokens it has. Medians over the kills.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np

from grpo.types import Prompt, Rollout, SampleRequest
from orchestration.config import Recipe, read_recipe
from orchestration.group_task import rollout_seed
from orchestration.prompt_order import PromptOrder
from orchestration.roles import Roles, started_roles
from orchestration.run_inputs import planned_order
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from orchestration.weight_sync import sync_weights
from rollout_workers.tokenization import Tokenization

WORKERS, ROLLOUTS, GROUPS_AT_A_WORKER = 2, 8, 4
VERSION = 1
POLL_S = 0.005
SETTLE_S = 2.0  # of full load before a kill
SETTINGS = {
    "num_prompts_per_step": 8,
    "rollout.workers": WORKERS,
    "rollout.cpus_per_worker": 1,
    "learner.backend": "torch",
    "learner.cpus_per_rank": 1,
    "data.evaluation": "null",
}


@dataclass(kw_only=True)
class Load:
    """Groups that are sampled all the time, as a run would."""

    roles: Roles
    prompts: PromptOrder
    recipe: Recipe
    took_s: list[float] = field(default_factory=list)  # of groups that no kill has touched
    started: dict[int, float] = field(default_factory=dict)  # by group, under way
    num_tokens: dict[int, int] = field(default_factory=dict)  # by group, finished
    disturbed: set[int] = field(default_factory=set)
    numbers: Iterator[int] = field(default_factory=count)

    async def keep(self) -> None:
        """One group after the other."""
        while True:
            group = next(self.numbers)
            self.started[group] = time.monotonic()
            rollouts = await self.roles.engine.sample(self.requests(group, ROLLOUTS))
            took_s = time.monotonic() - self.started.pop(group)
            self.num_tokens[group] = sum(rollout.num_tokens for rollout in rollouts)
            if group not in self.disturbed:
                self.took_s.append(took_s)

    def requests(self, group: int, number: int) -> list[SampleRequest]:
        """As the driver asks for them."""
        prompt: Prompt = self.prompts.at(group)
        return [
            SampleRequest(
                group=group,
                index=index,
                context=prompt.tokens,
                guidance=np.zeros(0, np.int32),
                sampling=self.recipe.sampling.drawn(),
                seed=rollout_seed(self.recipe.seed, group, 0, index),
            )
            for index in range(number)
        ]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One kill."""

    seconds: float
    groups: tuple[int, ...]  # that the worker was at
    shares: tuple[float, ...]  # how far it was with them


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each engine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{WORKERS} rollout workers, {GROUPS_AT_A_WORKER} groups of {ROLLOUTS} rollouts at each")
    print(f"{'engine':14}{'kills':>6}{'s to a full pool':>18}{'lowest':>8}{'highest':>9}", end="")
    print(f"{'groups asked again':>20}{'tokens lost':>13}{'highest':>9}")
    with tempfile.TemporaryDirectory() as folder:
        data = write_datasets(Path(folder), num_train=1000, num_heldout=10)
        for engine in options.engines:
            settings = {**SETTINGS, "rollout.engine": engine, "data.train": data.train}
            overrides = [f"{name}={value}" for name, value in settings.items()]
            recipe = read_recipe("recipes/quickstart.yaml", overrides).recipe
            asyncio.run(_measure(recipe, options.kills))


async def _measure(recipe: Recipe, kills: int) -> None:
    waits = Waits()
    prompts = planned_order(recipe, Tokenization(recipe.model))
    async with started_roles(recipe, local=False, waits=waits, on_phase=lambda name: None) as roles:
        await sync_weights(roles.learner, roles.engine, VERSION)
        load = Load(roles=roles, prompts=prompts, recipe=recipe)
        async with asyncio.TaskGroup() as tasks:
            busy = [tasks.create_task(load.keep()) for _ in range(WORKERS * GROUPS_AT_A_WORKER)]
            found = [await _recovered(load, waits, number % WORKERS) for number in range(kills)]
            await asyncio.sleep(SETTLE_S)  # what was asked for again ends
            for task in busy:
                task.cancel()
    _print(recipe, load, found)


async def _recovered(load: Load, waits: Waits, place: int) -> Recovery:
    """Kill the worker at this place and wait until the one in its stead has served."""
    await asyncio.sleep(SETTLE_S)
    owner, pool = f"rollout worker {place}", load.roles.engine.pool
    before = list(pool.workers)
    lost_pid = waits.whereabouts[owner].pid
    now = time.monotonic()
    groups = [
        int(wait.asked.rpartition(" ")[2])
        for wait in waits.open
        if wait.owner == owner and wait.asked.startswith("sampling")
    ]
    usual_s = median(load.took_s)
    shares = [min(1.0, (now - load.started[group]) / usual_s) for group in groups]
    load.disturbed.update(load.started)
    os.kill(lost_pid, signal.SIGKILL)
    while not (new := [worker for worker in pool.workers if worker not in before]):
        await asyncio.sleep(POLL_S)
    (rollout,) = await new[0].sample(load.requests(0, 1))
    _require_current(rollout)
    assert len(pool.workers) == WORKERS
    seconds = time.monotonic() - now
    load.disturbed.update(load.started)
    return Recovery(seconds=seconds, groups=tuple(groups), shares=tuple(shares))


def _require_current(rollout: Rollout) -> None:
    assert set(rollout.versions.tolist()) == {VERSION}, rollout.versions


def _print(recipe: Recipe, load: Load, found: Sequence[Recovery]) -> None:
    seconds = [item.seconds for item in found]
    lost = [
        sum(share * load.num_tokens[group] for group, share in zip(i.groups, i.shares, strict=True))
        for i in found
    ]
    print(
        f"{recipe.rollout.engine:14}{len(found):>6}{median(seconds):>18.1f}{min(seconds):>8.1f}"
        f"{max(seconds):>9.1f}{median(len(i.groups) for i in found):>20.0f}"
        f"{median(lost):>13.0f}{max(lost):>9.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
