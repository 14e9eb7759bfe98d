"""Small implementations of the Protocols that check what they are given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo.types import (
    FinishReason,
    Float32,
    Group,
    Int32,
    LoadReport,
    MeasureRequest,
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


class FakeTokenizer:
    """One token for each character, its code; token 2 ends a completion, 1 begins a prompt."""

    stop_ids = (2,)

    def encode_prompt(self, prompt: str) -> Int32:
        return np.array([1, *map(ord, prompt)], np.int32)

    def encode_text(self, text: str) -> Int32:
        return np.array([*map(ord, text)], np.int32)

    def decode(self, tokens: Int32) -> tuple[str, Int32]:
        text = "".join(chr(token) for token in tokens)
        return text, np.arange(1, len(tokens) + 1, dtype=np.int32)


@dataclass
class FakeEngine:
    """Answers at once, or when `gate` opens; four tokens that follow from the seed alone.

    As the real ones do, it begins with the guidance, keeps to the budget, and samples nothing
    after guidance that ends with the stop token.
    """

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
        given = len(request.guidance)
        is_whole = given > 0 and request.guidance[-1] == 2
        room = 0 if is_whole else request.sampling.max_tokens - given
        assert is_whole or room > 0, "given tokens leave no room"
        sampled = np.random.default_rng(request.seed).integers(3, 60, size=4)[:room]
        tokens = np.concatenate([request.guidance, sampled]).astype(np.int32)
        text, token_ends = FakeTokenizer().decode(tokens)
        is_given = np.arange(len(tokens)) < given
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=tokens,
            log_probs=np.where(is_given, 0.0, -1.0).astype(np.float32),
            origins=np.where(is_given, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8),
            versions=np.where(is_given, -1, self.version).astype(np.int32),
            text=text,
            token_ends=token_ends,
            finish_reason=FinishReason.STOP if is_whole or room > 3 else FinishReason.LENGTH,
        )

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        assert ref.version >= self.version, "an older version was loaded over a newer one"
        self.version = ref.version
        return LoadReport(version=ref.version, checksum=ref.checksum, timings_s={"load": 0.0})


@dataclass
class FakeScorer:
    """1 where the first token is even; a failure for the groups that are named.

    One that learns remembers the groups it has seen.
    """

    name: str = "answer"
    failing: frozenset[int] = frozenset()
    learns: bool = False
    learnt: list[int] = field(default_factory=list)  # group ids

    async def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        self.learnt += [group.id for group in groups]
        return {"num_learnt": float(len(self.learnt))}

    async def save(self, folder: Path) -> None:
        (folder / "learnt.json").write_text(json.dumps(self.learnt))

    async def load(self, folder: Path) -> None:
        self.learnt = json.loads((folder / "learnt.json").read_text())

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
    measured: list[MeasureRequest] = field(default_factory=list)

    async def train(self, batch: TrainBatch) -> StepReport:
        # A stage follows a step whose weights have no number yet.
        expected = self.version + batch.is_stage
        assert batch.version == expected, "the batch names other weights than the learner's"
        self.batches.append(batch)
        rows = [row for update in batch.updates for row in update]
        fresh = sum(int((row.versions == batch.version).sum()) for row in rows)
        await asyncio.sleep(0)
        metrics = {"log_prob_gap/num_tokens": float(fresh)}
        if fresh:  # a mean of nothing is absent
            metrics |= {"log_prob_gap/max": 0.0, "log_prob_gap/mean": 0.0}
        return StepReport(metrics=metrics, timings_s={})

    async def measure(self, request: MeasureRequest) -> dict[str, list[list[Float32]]]:
        """Every token of a row measures the row's place in its group, plus its label if it has one.

        The answer depends on the learner's version, so that old answers can be told from new.
        """
        self.measured.append(request)
        return {
            name: [
                [
                    np.full(
                        len(row.tokens), self.version + row.index + np.nan_to_num(label)
                    ).astype(np.float32)
                    for row, label in zip(rows, labels, strict=True)
                ]
                for rows, labels in zip(request.groups, request.labels, strict=True)
            ]
            for name in request.names
        }

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
