"""Small implementations of the Protocols that check what they are given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo.types import (
    FinishReason,
    Group,
    LoadReport,
    Origin,
    Prompt,
    Rollout,
    SampleRequest,
    Score,
    Span,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightRef,
)
from orchestration.driver import TrainedStep
from orchestration.group_task import DroppedGroup


def a_prompt(number: int) -> Prompt:
    """Prompts that differ in id and tokens."""
    return Prompt(
        id=f"prompt-{number}",
        text=str(number),
        tokens=np.array([1, 2 + number % 50], np.int32),
        reference=str(number),
    )


@dataclass
class FakeEngine:
    """Answers at once, or when `gate` opens; tokens follow from the seed alone."""

    version: int = 0
    gate: asyncio.Event | None = None
    asked: list[SampleRequest] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)  # raised by the next calls

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        self.asked += requests
        if self.failures:
            raise self.failures.pop(0)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: SampleRequest) -> Rollout:
        tokens = np.random.default_rng(request.seed).integers(3, 60, size=4).astype(np.int32)
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=tokens,
            log_probs=np.full(4, -1.0, np.float32),
            origins=np.full(4, Origin.POLICY, np.uint8),
            versions=np.full(4, self.version, np.int32),
            text=" ".join(map(str, tokens)),
            token_ends=np.arange(1, 5, dtype=np.int32),
            finish_reason=FinishReason.STOP,
        )

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        assert ref.version >= self.version, "an older version was loaded over a newer one"
        self.version = ref.version
        return LoadReport(version=ref.version, checksum=ref.checksum, timings_s={"load": 0.0})


@dataclass
class FakeScorer:
    """1 where the first token is even; a failure for the groups that are named."""

    name: str = "answer"
    failing: frozenset[int] = frozenset()

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        await asyncio.sleep(0)
        assert all(s.end <= group.rollouts[s.rollout].num_tokens for s in spans)
        if group.id in self.failing:
            return [Score(scorer=self.name, span=s, value=None, failure="broken") for s in spans]
        return [
            Score(
                scorer=self.name,
                span=s,
                value=float(group.rollouts[s.rollout].tokens[0] % 2 == 0),
            )
            for s in spans
        ]


@dataclass
class FakeLearner:
    """Counts what it is given; its log-probabilities agree with FakeEngine's."""

    version: int = 0
    batches: list[TrainBatch] = field(default_factory=list)
    damage_checksum: bool = False

    async def train(self, batch: TrainBatch) -> StepReport:
        assert batch.version == self.version, "the batch names other weights than the learner's"
        self.batches.append(batch)
        rows = [row for update in batch.updates for row in update]
        fresh = sum(int((row.versions == batch.version).sum()) for row in rows)
        await asyncio.sleep(0)
        metrics = {"log_prob_gap/num_tokens": float(fresh)}
        if fresh:  # a mean of nothing is absent
            metrics |= {"log_prob_gap/max": 0.0, "log_prob_gap/mean": 0.0}
        return StepReport(metrics=metrics, timings_s={})

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return [[-1.0] * len(row.tokens) for row in rows]

    async def publish(self, version: int) -> WeightRef:
        self.version = version
        return WeightRef(version=version, num_bytes=0, checksum=version, location=None)

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    async def load(self, folder: Path) -> None:
        assert folder.exists()

    @property
    def trained_groups(self) -> list[int]:
        rows = [row for batch in self.batches for update in batch.updates for row in update]
        return list(dict.fromkeys(row.group for row in rows))


@dataclass
class FakeJournal:
    """Remembers everything."""

    steps: list[TrainedStep] = field(default_factory=list)
    fallen: list[DroppedGroup] = field(default_factory=list)

    def trained(self, step: TrainedStep) -> None:
        self.steps.append(step)

    def dropped(self, group: DroppedGroup) -> None:
        self.fallen.append(group)
