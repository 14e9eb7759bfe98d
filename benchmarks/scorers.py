"""How fast are scorers, and what does their service cost?

    python -m benchmarks.scorers              every scorer, in this process
    python -m benchmarks.scorers --ray        the actors of the scaling table are Ray actors

Prints for each scorer the scores per second of one actor, how full its batches were, and the time
per score beside a bare loop over the same function in batches of the same size (overhead; a process
of its own, pickling and all bookkeeping included). A rule is computed in place, group by group: its
"batch" is a group, of 8 or of 64 rollouts. Then the throughput of a judge that only waits, as a
remote one would, with 1, 2 and 4 actors. Ratios are what to compare between machines, on one that
does nothing else; benchmarks/model_scorers.py has the scorers that are models.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo.types import FinishReason, Group, Origin, Prompt, Rollout, Span
from orchestration.local import LocalScorerSpawner
from orchestration.places import Spawner
from orchestration.pool import ActorPool
from orchestration.scorer_pool import ScorerPool, ScorerWorker
from orchestration.waits import Waits
from reward_services.batches import joined
from reward_services.config import ScorerConfig
from reward_services.rule_function import judged_texts
from reward_services.rule_scores import score_rule
from reward_services.sandbox import Sandbox
from reward_services.sandbox_config import SandboxConfig
from reward_services.service import ScorerService
from reward_services.unit_tests import program_in, read_tests, results
from reward_services.user_functions import Batch, judged, loaded_function

GROUP_SIZE, BATCH_SIZE = 8, 64
SLEEP_S = 0.05  # of the stand-in for a remote judge, per batch

FUNCTIONS = f"""
import hashlib, time

def work(completions, **kwargs):
    '''About a millisecond of real work for each completion.'''
    return [float(hashlib.pbkdf2_hmac("sha256", c.encode(), b"", 1500)[0]) for c in completions]

def light(completions, **kwargs):
    return [float("4" in c) for c in completions]

def sleeping(completions, **kwargs):
    time.sleep({SLEEP_S})
    return [1.0] * len(completions)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of the first table."""

    name: str
    bare_s: float  # per score
    service_s: float
    batch_fill: float

    @property
    def overhead(self) -> float:
        return self.service_s / self.bare_s - 1


def written_groups(num_groups: int, text: str, size: int = GROUP_SIZE) -> list[Group]:
    """Distinct completions, so that the cache answers none of them."""
    groups = []
    for g in range(num_groups):
        texts = [f"{text} answer: {g * size + i}" for i in range(size)]
        prompt = Prompt(
            id=f"bench:{g}",
            text="7 +5",
            tokens=np.zeros(4, np.int32),
            reference="12",
            columns={"prompt": "7 +5", "tests": ["assert f(2) == 4", "assert f(3) == 9"]},
        )
        rollouts = tuple(_rollout(i, t) for i, t in enumerate(texts))
        groups.append(Group(id=g, prompt=prompt, rollouts=rollouts))
    return groups


def _rollout(index: int, text: str) -> Rollout:
    size = len(text)
    return Rollout(
        index=index,
        context=np.zeros(4, np.int32),
        tokens=np.frombuffer(text.encode(), np.uint8).astype(np.int32),
        log_probs=np.zeros(size, np.float32),
        origins=np.full(size, Origin.POLICY, np.uint8),
        versions=np.zeros(size, np.int32),
        text=text,
        token_ends=np.arange(1, size + 1, dtype=np.int32),
        finish_reason=FinishReason.STOP,
    )


def spans_of(group: Group) -> list[Span]:
    return [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]


def in_batches(groups: Sequence[Group]) -> list[list[tuple[Group, Span]]]:
    items = [(group, span) for group in groups for span in spans_of(group)]
    return [items[i : i + BATCH_SIZE] for i in range(0, len(items), BATCH_SIZE)]


def bare_loop(config: ScorerConfig, groups: Sequence[Group]) -> float:
    """Seconds per score of the function alone, called in this thread as a service would call it."""
    batches = in_batches(groups)
    rule = score_rule(config)
    function = loaded_function(config.function) if config.function is not None else None
    joint = [joined(batch) for batch in batches]
    before = time.perf_counter()
    for items, batch in zip(batches, joint, strict=True):
        if rule is not None:
            for group, span in items:
                rule(group, span)
        elif function is not None:
            judged(function, batch)
        elif config.code is not None:
            _bare_programs(config.code, batch)
        else:
            pairs = zip(batch.prompt_texts, batch.completion_texts, strict=True)
            queries = [prompt + completion for prompt, completion in pairs]
            settings = config.model_dump_json()
            judged_texts(queries, batch.prompt_texts, batch.references, config=settings)
    return (time.perf_counter() - before) / sum(map(len, batches))


def _bare_programs(config: SandboxConfig, batch: Batch) -> None:
    """One program after the other; the service runs `parallel` of them side by side."""
    sandbox = Sandbox(config)
    for text, tests in zip(batch.completion_texts, batch.columns["tests"], strict=True):
        results(sandbox, config, program_in(text), read_tests(tests), end=time.monotonic() + 60)


async def in_service(config: ScorerConfig, groups: Sequence[Group]) -> tuple[float, float]:
    """(seconds per score, batch fill) with every group waiting at the same time."""
    service = ScorerService(config)
    await service.start()
    try:
        warm = written_groups(1, "warm")  # imports, and the interpreter's own start
        await service.score(warm[0], spans_of(warm[0]))
        service.statistics.num_calls = service.statistics.num_judged = 0
        before = time.perf_counter()
        scores = await asyncio.gather(*[service.score(g, spans_of(g)) for g in groups])
        seconds = time.perf_counter() - before
    finally:
        await service.close()
    flat = [score for part in scores for score in part]
    failed = [score.failure for score in flat if score.failure is not None]
    if failed:
        raise SystemExit(f"{config.name}: {len(failed)} scores failed, first: {failed[0]}")
    return seconds / len(flat), service.statistics.batch_fill(BATCH_SIZE)


def measured(config: ScorerConfig, groups: Sequence[Group], repeats: int) -> Measured:
    """The best of some repeats of each, taken in turns: a shared machine slows both alike."""
    bare, service = [], []
    for _ in range(repeats):
        bare.append(bare_loop(config, groups))
        service.append(asyncio.run(in_service(config, groups)))
    service_s, fill = min(service)
    return Measured(name=config.name, bare_s=min(bare), service_s=service_s, batch_fill=fill)


async def throughput(spawner: Spawner[ScorerWorker], num_actors: int) -> float:
    """Scores per second of a pool, each group asked for as its rollouts would end."""
    groups = written_groups(8 * BATCH_SIZE // GROUP_SIZE * 4, "")
    async with asyncio.TaskGroup() as tasks:
        pool = ActorPool(
            "scorer",
            spawner,
            tasks=tasks,
            retries=0,
            deadline_s=600,
            start_deadline_s=600,
            waits=Waits(),
        )
        scorer = ScorerPool("sleeping", pool)
        await pool.start(num_actors)
        try:
            before = time.perf_counter()
            await asyncio.gather(*[scorer.score(group, spans_of(group)) for group in groups])
            return len(groups) * GROUP_SIZE / (time.perf_counter() - before)
        finally:
            await pool.close()


@contextlib.contextmanager
def spawner_of(config: ScorerConfig, *, on_ray: bool) -> Iterator[Spawner[ScorerWorker]]:
    """How the actors of the scaling table are made."""
    if not on_ray:
        yield LocalScorerSpawner(config)
        return
    import ray

    from orchestration.handles import RayScorerSpawner

    root = str(Path(__file__).parents[1])
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        yield RayScorerSpawner(config)
    finally:
        ray.shutdown()


def configs(functions: Path) -> list[tuple[ScorerConfig, list[Group]]]:
    """Scorers and the groups that each of them scores."""
    program = "```python\ndef f(x): return x * x\n```\n"
    found = [
        (ScorerConfig(name="numeric", rule="numeric"), written_groups(256, "7+5=12")),
        (ScorerConfig(name="numeric-64", rule="numeric"), written_groups(32, "7+5=12", 64)),
        (
            ScorerConfig(name="repetition-64", rule="repetition"),
            written_groups(32, "a b " * 30, 64),
        ),
        (ScorerConfig(name="math", rule="math"), written_groups(32, "$\\frac{24}{2}$")),
        (ScorerConfig(name="function-1ms", function=f"{functions}:work"), written_groups(64, "x")),
        (
            ScorerConfig(name="function-trivial", function=f"{functions}:light"),
            written_groups(256, "x"),
        ),
    ]
    missing = Sandbox(SandboxConfig()).missing()
    if missing is None:
        code = SandboxConfig(parallel=os.cpu_count() or 1)
        found.append((ScorerConfig(name="unit-tests", code=code), written_groups(4, program)))
    else:
        print(f"unit tests: not measured, no isolation on this host: {missing}")
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="How fast are scorers?")
    parser.add_argument("--ray", action="store_true", help="scaling over Ray actors")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        functions = Path(folder, "functions.py")
        functions.write_text(FUNCTIONS)
        print(
            f"{'scorer':20} {'scores/s':>10} {'fill':>6} {'bare us':>9} {'us':>9} {'overhead':>9}"
        )
        for config, groups in configs(functions):
            row = measured(config, groups, options.repeats)
            print(
                f"{row.name:20} {1 / row.service_s:10.0f} {row.batch_fill:6.0%} "
                f"{row.bare_s * 1e6:9.1f} {row.service_s * 1e6:9.1f} {row.overhead:9.1%}"
            )
        sleeping = ScorerConfig(name="sleeping", function=f"{functions}:sleeping", max_wait_ms=20)
        ideal = BATCH_SIZE / SLEEP_S
        print(f"\na judge that waits {SLEEP_S * 1000:g} ms for each batch of {BATCH_SIZE}:")
        with spawner_of(sleeping, on_ray=options.ray) as spawner:
            for num_actors in (1, 2, 4):
                rate = asyncio.run(throughput(spawner, num_actors))
                share = rate / (ideal * num_actors)
                print(f"{num_actors} actors {rate:8.0f} scores/s, {share:.0%} of what is possible")


if __name__ == "__main__":
    main(sys.argv[1:])
