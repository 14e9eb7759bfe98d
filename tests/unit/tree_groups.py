"""Trees of rollouts for tests: written by hand, or grown by the real group task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo.pipeline import Pipeline, State
from grpo.types import (
    FinishReason,
    Float64,
    Group,
    Origin,
    Piece,
    Rollout,
    SampleRequest,
    Sampling,
    Score,
    Span,
)
from orchestration.group_task import FinishedGroup, GroupRecipe, ScorerRole, run_group
from tests.fakes import FakeTokenizer, a_prompt
from tests.unit.grpo_groups import rollout, scored

STOP = 2


def pieced(index: int, *pieces: tuple[int, int], log_probs: Sequence[float] | None = None):
    """A rollout of these pieces (id, end)."""
    lineage = tuple(Piece(id=name, end=end) for name, end in pieces)
    return replace(rollout(index, pieces[-1][1], log_probs=log_probs), lineage=lineage)


def two_by_two(rewards: Sequence[float | None] = (1, 0, 1, 1)) -> Group:
    """Root -> a (3 tokens) -> a1 (2), a0 (4); b (2) -> b1 (3), b2 (3)."""
    leaves = [
        pieced(0, (0, 3), (2, 5)),
        pieced(1, (0, 3), (3, 7)),
        pieced(2, (1, 2), (4, 5)),
        pieced(3, (1, 2), (5, 5)),
    ]
    return scored(leaves, answer=list(rewards))


@dataclass
class TreeEngine:
    """A policy whose next token follows from the request's seed and the place alone.

    `ends` is the chance of ending after each token, `newline` that of a new line.
    """

    ends: float = 0.1
    newline: float = 0.2
    waves: int = 0

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        self.waves += 1
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: SampleRequest) -> Rollout:
        rng = np.random.default_rng(request.seed)
        given = len(request.guidance)
        tokens = request.guidance.tolist()
        while len(tokens) < request.sampling.max_tokens:
            is_line = rng.random() < self.newline
            tokens.append(10 if is_line else int(rng.integers(97, 122)))
            if rng.random() < self.ends:
                tokens[-1] = STOP
                break
        is_given = np.arange(len(tokens)) < given
        text, token_ends = FakeTokenizer().decode(np.array(tokens, np.int32))
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=np.array(tokens, np.int32),
            log_probs=np.where(is_given, 0, -2 * rng.random(len(tokens))).astype(np.float32),
            origins=np.where(is_given, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8),
            versions=np.where(is_given, -1, 0).astype(np.int32),
            text=text,
            token_ends=token_ends,
            finish_reason=FinishReason.STOP if tokens[-1] == STOP else FinishReason.LENGTH,
        )


@dataclass
class SpanScorer:
    """Scores each span by a function of the rollout and the span."""

    name: str
    value: Callable[[Rollout, Span], float | None]

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        return [
            Score(scorer=self.name, span=span, value=self.value(group.rollouts[span.rollout], span))
            for span in spans
        ]


def has_even_sum(found: Rollout, span: Span) -> float:
    """Right or wrong by chance, as it were."""
    return float(int(found.tokens[: span.end].sum()) % 2 == 0)


def grown(
    pipeline: Pipeline,
    *,
    number: int = 0,
    max_tokens: int = 24,
    engine: TreeEngine | None = None,
    state: State = None,
    **values: Callable[[Rollout, Span], float | None],
) -> Group:
    """A group by the real group task: plan, sample, score, select."""
    values = values or {"answer": has_even_sum}
    common = GroupRecipe(
        pipeline=pipeline,
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens),
        run_seed=7,
        engine=engine or TreeEngine(),
        tokenizer=FakeTokenizer(),
        scorers={
            name: ScorerRole(scorer=SpanScorer(name, value), stop_on_failure=True)
            for name, value in values.items()
        },
    )
    found = asyncio.run(run_group(common, number, a_prompt(number), state))
    assert isinstance(found, FinishedGroup), found
    return found.group


def firsts(rows: Sequence[Float64], *places: int) -> list[float]:
    """Of each row the values at these places, which every test knows."""
    return [float(row[place]) for row in rows for place in places]
