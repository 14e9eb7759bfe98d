"""Scorers and a learner that only wait, a tokenizer of characters, and who makes the workers.

Time is the event loop's. Refuses to know the driver, which takes them for real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from grpo.engines import RolloutEngine
from grpo.types import (
    Float32,
    Group,
    Int32,
    MeasureRequest,
    Score,
    Span,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightRef,
)
from orchestration.scorer_pool import ScorerWorker
from orchestration.simulation.engine import LOG_PROB, STOP, SimulatedEngine, random_tokens
from orchestration.simulation.services import ServiceCpu, Services

MEASURING_SPEED = 3.0  # a forward pass costs a third of a training pass


class SimulatedTokenizer:
    """One token for each character, its code; refuses no text."""

    stop_ids = (STOP,)

    def encode_prompt(self, prompt: str) -> Int32:
        """The characters."""
        return self.encode_text(prompt)

    def encode_text(self, text: str) -> Int32:
        """The characters."""
        return np.array([*map(ord, text)], np.int32)

    def decode(self, tokens: Int32) -> tuple[str, Int32]:
        """The characters, and where each ends."""
        return "".join(map(chr, tokens)), np.arange(1, len(tokens) + 1, dtype=np.int32)


class SimulatedScorer:
    """A scorer actor that takes one group at a time; every second answer is right."""

    def __init__(
        self, name: str, services: Services, cpu: ServiceCpu, scored_at: dict[int, float]
    ) -> None:
        self._name = name
        self._services = services
        self._cpu = cpu
        self._scored_at = scored_at  # group -> second
        self._turn = asyncio.Lock()

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        """After a while, 0 or 1 for each span."""
        async with self._turn:
            await asyncio.sleep(self._services.scorer_s)
        self._scored_at[group.id] = asyncio.get_running_loop().time()
        with self._cpu.counted():
            is_constant = self._services.is_constant(group.id)
            return [
                Score(
                    scorer=self._name,
                    span=span,
                    value=0.0 if is_constant else float((group.id + span.rollout) % 2),
                )
                for span in spans
            ]

    async def statistics(self) -> Mapping[str, float]:
        """None: they would be invented."""
        return {}

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Learns nothing, as long as it takes to score the groups."""
        async with self._turn:
            await asyncio.sleep(self._services.scorer_s * len(groups))
        return {}

    async def save(self, folder: Path) -> None:
        """There is nothing to save."""

    async def load(self, folder: Path) -> None:
        """There is nothing to load."""


class SimulatedLearner:
    """All ranks as one."""

    def __init__(self, services: Services, cpu: ServiceCpu) -> None:
        self.busy_s = 0.0  # what it has computed
        self.began = 0.0  # the second at which it was last given a batch
        self._services = services
        self._cpu = cpu

    async def train(self, batch: TrainBatch) -> StepReport:
        """Takes the time of all rows, and finds no difference to the engine."""
        if not batch.is_stage:
            self.began = asyncio.get_running_loop().time()
        with self._cpu.counted():
            rows = [row for update in batch.updates for row in update]
            seconds = sum(row.num_tokens for row in rows) / self._services.learner_tokens_per_s
            fresh = sum(np.count_nonzero(row.versions == batch.version) for row in rows)
        await self._works(seconds)
        metrics = {"log_prob_gap/num_tokens": float(fresh)}
        if fresh:  # a mean of nothing is absent
            metrics |= {"log_prob_gap/mean": 0.0, "log_prob_gap/max": 0.0}
        return StepReport(metrics=metrics, timings_s={"train": seconds})

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        """Zeros, after a forward pass."""
        with self._cpu.counted():
            tokens = sum(row.num_tokens for rows in request.groups for row in rows)
            found = {
                name: [
                    [np.zeros(len(row.tokens), np.float32) for row in rows]
                    for rows in request.groups
                ]
                for name in request.names
            }
        await self._works(tokens / (MEASURING_SPEED * self._services.learner_tokens_per_s))
        return found

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        """The engine's."""
        tokens = sum(row.num_tokens for row in rows)
        await self._works(tokens / (MEASURING_SPEED * self._services.learner_tokens_per_s))
        return [[LOG_PROB] * len(row.tokens) for row in rows]

    async def publish(self, version: int) -> WeightRef:
        """No weights."""
        await asyncio.sleep(self._services.publish_s)
        return WeightRef(version=version, num_bytes=0, checksum=version, location=None)

    async def snapshot(self) -> None:
        """There is nothing to save."""

    async def write(self, folder: Path) -> Sequence[str]:
        """There is nothing to save."""
        return ()

    async def load(self, folder: Path) -> None:
        """There is nothing to load."""

    async def close(self) -> None:
        """There is nothing to end."""

    async def _works(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.busy_s += seconds


class EngineSpawner:
    """Rollout workers at once; remembers them, so that their work can be added up."""

    def __init__(self, services: Services, cpu: ServiceCpu, max_tokens: int) -> None:
        self.engines: list[SimulatedEngine] = []
        self._services = services
        self._cpu = cpu
        self._random_tokens = random_tokens(max_tokens)  # one array for all workers

    async def spawn(self, place: int) -> RolloutEngine:
        """A new worker, which has loaded nothing yet."""
        engine = SimulatedEngine(self._services, self._cpu, self._random_tokens)
        self.engines.append(engine)
        return engine

    async def discard(self, worker: RolloutEngine) -> None:
        """What it worked stays counted."""


class ScorerSpawner:
    """Actors of one scorer."""

    def __init__(
        self, name: str, services: Services, cpu: ServiceCpu, scored_at: dict[int, float]
    ) -> None:
        """`scored_at`: the actors write down when they have scored which group."""
        self._name = name
        self._services = services
        self._cpu = cpu
        self._scored_at = scored_at

    async def spawn(self, place: int) -> ScorerWorker:
        """A new actor."""
        return SimulatedScorer(self._name, self._services, self._cpu, self._scored_at)

    async def discard(self, worker: ScorerWorker) -> None:
        """Nothing is held."""
