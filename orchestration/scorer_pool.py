"""The actors of one scorer as one: scores, what it has learnt, and how it fares.

Refuses to know what is scored and whether a worker is an actor or an object in this process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from grpo.engines import LearningScorer, Scorer
from grpo.errors import StateLost, Transient, WorkerLost
from grpo.types import Group, Score, Span
from orchestration.pool import ActorPool, Exhausted

STATISTICS_DEADLINE_S = 5.0  # figures are not worth a longer wait


class ScorerWorker(Scorer, LearningScorer, Protocol):
    """One worker of a scorer; learns only if its scorer does."""

    async def statistics(self) -> Mapping[str, float]:
        """Its counters so far."""
        ...


class ScorerPool:
    """A Scorer over several; when the budget is used up the scores say so and are no numbers."""

    def __init__(self, name: str, pool: ActorPool[ScorerWorker]) -> None:
        self._name = name
        self.pool = pool
        # The worker that has learnt something, in a pool of one: another one would not know it.
        self._pupil: ScorerWorker | None = None

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        """Scores of all spans from one worker."""

        async def scored(worker: ScorerWorker) -> list[Score]:
            self._require_pupil(worker)
            return await worker.score(group, spans)

        try:
            return await self.pool.run(f"scoring group {group.id}", scored)
        except Exhausted as error:
            return [
                Score(scorer=self._name, span=span, value=None, failure=str(error))
                for span in spans
            ]

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Train the scorer's model on the groups of a step."""

        async def taught(worker: ScorerWorker) -> Mapping[str, float]:
            self._require_pupil(worker)
            metrics = await worker.learn(groups)
            self._pupil = worker
            return metrics

        return await self.pool.run("learning", taught)

    async def save(self, folder: Path) -> None:
        """Write what the scorer has learnt."""

        async def saved(worker: ScorerWorker) -> None:
            self._require_pupil(worker)
            await worker.save(folder)

        await self.pool.run("saving", saved)

    async def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""

        async def loaded(worker: ScorerWorker) -> None:
            await worker.load(folder)
            self._pupil = worker

        await self.pool.run("loading", loaded)

    def forget(self) -> None:
        """Begin anew, with a worker that has learnt nothing."""
        if self._pupil is not None:
            self.pool.replace(self._pupil, WorkerLost("it forgets what it has learnt"))
            self._pupil = None

    async def statistics(self) -> dict[str, float]:
        """The counters of all workers that answer, added up."""
        total: Counter[str] = Counter()
        for counters in await asyncio.gather(*map(_statistics, self.pool.workers)):
            total.update(counters)
        return dict(total)

    def _require_pupil(self, worker: ScorerWorker) -> None:
        if self._pupil is not None and worker is not self._pupil:
            lost = StateLost(f"scorer {self._name} is lost together with what it had learnt")
            lost.owner = f"scorer {self._name}"
            raise lost


def scorer_metrics(
    name: str, counters: Mapping[str, float], *, batch_size: int
) -> dict[str, float]:
    """Figures of the run so far. A share of nothing is absent, as is a scorer that is silent."""
    if not counters:
        return {}
    found = {"num_failures": counters["num_failures"]}
    if counters["num_scores"]:
        found["hit_rate"] = counters["num_cached"] / counters["num_scores"]
    if counters["num_calls"]:
        found["batch_fill"] = counters["num_judged"] / (counters["num_calls"] * batch_size)
    return {f"scorers/{name}/{figure}": value for figure, value in found.items()}


async def _statistics(worker: ScorerWorker) -> Mapping[str, float]:
    """Nothing from a worker that is lost or busy: its next call finds that out."""
    try:
        async with asyncio.timeout(STATISTICS_DEADLINE_S):
            return await worker.statistics()
    except (Transient, TimeoutError):
        return {}
