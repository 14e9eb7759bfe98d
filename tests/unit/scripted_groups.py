"""Groups brought through the real group task by an engine that writes what the test says.

One character is one token and token 2 ends a completion, as in `tests.fakes.FakeTokenizer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo.pipeline import Pipeline, State
from grpo.types import (
    FinishReason,
    Group,
    Int32,
    Origin,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    Score,
    Span,
)
from orchestration.group_task import (
    DroppedGroup,
    FinishedGroup,
    GroupRecipe,
    ScorerRole,
    run_group,
)
from tests.fakes import FakeTokenizer

LOG_PROB = -0.5  # of every token that is sampled


class CharacterTokenizer(FakeTokenizer):
    """Decodes the stop token to nothing, as real tokenizers do."""

    def decode(self, tokens: Int32) -> tuple[str, Int32]:
        pieces = ["" if token == 2 else chr(token) for token in tokens]
        return "".join(pieces), np.cumsum([len(piece) for piece in pieces]).astype(np.int32)


@dataclass
class ScriptedEngine:
    """The rollout of a request goes on as `answers` says for (context, given text, place)."""

    answer: Callable[[str, str, int], str]
    asked: list[SampleRequest] = field(default_factory=list)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        self.asked += requests
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: SampleRequest) -> Rollout:
        tokenizer = CharacterTokenizer()
        context, _ = tokenizer.decode(request.context[1:])
        before, _ = tokenizer.decode(request.guidance)
        given = len(request.guidance)
        whole = given > 0 and request.guidance[-1] == 2
        room = 0 if whole else request.sampling.max_tokens - given
        assert whole or room > 0, "given tokens leave no room"
        wanted = [] if whole else [*map(ord, self.answer(context, before, request.index)), 2]
        tokens = np.array([*request.guidance, *wanted[:room]], np.int32)
        text, token_ends = tokenizer.decode(tokens)
        is_given = np.arange(len(tokens)) < given
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=tokens,
            log_probs=np.where(is_given, 0.0, LOG_PROB).astype(np.float32),
            origins=np.where(is_given, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8),
            versions=np.where(is_given, -1, 0).astype(np.int32),
            text=text,
            token_ends=token_ends,
            finish_reason=FinishReason.STOP if len(wanted) <= room else FinishReason.LENGTH,
        )

    async def load_weights(self, ref: object) -> object:
        raise AssertionError("no weights are loaded here")


@dataclass
class TextScorer:
    """Judges the text of a span; remembers what it was asked."""

    name: str
    judge: Callable[[str], float]
    asked: list[tuple[int, str]] = field(default_factory=list)

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        scores = []
        for span in spans:
            rollout = group.rollouts[span.rollout]
            first = rollout.token_ends[span.start - 1] if span.start else 0
            last = rollout.token_ends[span.end - 1] if span.end else 0
            text = rollout.text[first:last]
            self.asked.append((span.rollout, text))
            scores.append(Score(scorer=self.name, span=span, value=self.judge(text)))
        return scores


def a_question(text: str = "q", **fields: object) -> Prompt:
    """A prompt with the tokens of its text."""
    tokens = FakeTokenizer().encode_prompt(text)
    return Prompt(**{"id": text, "text": text, "tokens": tokens, **fields})  # type: ignore[arg-type]


def grown_group(
    pipeline: Pipeline,
    engine: ScriptedEngine,
    scorers: Sequence[TextScorer],
    *,
    prompt: Prompt | None = None,
    state: State = None,
    max_tokens: int = 96,
) -> FinishedGroup | DroppedGroup:
    """What the real group task makes of it."""
    common = GroupRecipe(
        pipeline=pipeline,
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens),
        run_seed=0,
        engine=engine,  # type: ignore[arg-type]  # no weights are loaded
        tokenizer=CharacterTokenizer(),
        scorers={s.name: ScorerRole(scorer=s, stop_on_failure=True) for s in scorers},
    )
    return asyncio.run(run_group(common, 0, prompt or a_question(), state))
