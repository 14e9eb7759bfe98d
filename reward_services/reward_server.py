"""Scorers behind HTTP, in OpenRLHF's protocol, for other trainers and for a node of their own.

Knows nothing of recipes: it is given started scorers, a token and names.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from aiohttp import web
from pydantic import ValidationError

from grpo.types import FinishReason, Group, Origin, Prompt, Rollout, Score, Span
from reward_services.reward_protocol import RewardRequest, reply_body
from reward_services.service import ScorerService

_MAX_REQUEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedScorer:
    """One term of the reward."""

    service: ScorerService
    weight: float


class RewardServer:
    """Answers POST /get_reward with the weighted sum of its scorers, and each of them apart."""

    def __init__(
        self, scorers: Mapping[str, ServedScorer], *, token: str, label_columns: Sequence[str]
    ) -> None:
        """`label_columns`: the names under which user functions and unit tests find the label."""
        self._scorers = scorers
        self._token = token.encode()
        self._label_columns = tuple(label_columns)

    def app(self) -> web.Application:
        """The web application; every path but /health wants the token."""
        app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/statistics", self._statistics)
        app.router.add_post("/get_reward", self._get_reward)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"scorers": list(self._scorers)})

    async def _statistics(self, request: web.Request) -> web.Response:
        self._check_token(request)
        found = {
            name: {
                "scores": scorer.service.statistics.num_scores,
                "failures": scorer.service.statistics.num_failures,
                "cache_hit_rate": scorer.service.statistics.hit_rate,
            }
            for name, scorer in self._scorers.items()
        }
        return web.json_response(found)

    async def _get_reward(self, request: web.Request) -> web.Response:
        self._check_token(request)
        try:
            question = RewardRequest.model_validate_json(await request.read())
        except ValidationError as error:
            said = error.errors(include_url=False, include_input=False, include_context=False)
            return web.json_response({"error": said}, status=422)
        return web.json_response(await self._rewards(question))

    def _check_token(self, request: web.Request) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(token.encode(errors="surrogateescape"), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise web.HTTPUnauthorized(text="expected 'Authorization: Bearer TOKEN'")

    async def _rewards(self, question: RewardRequest) -> dict[str, object]:
        triples = zip(question.prompts, question.completions, question.labels, strict=True)
        groups = [self._group(i, *triple) for i, triple in enumerate(triples)]
        columns = await asyncio.gather(
            *[self._scores(scorer.service, groups) for scorer in self._scorers.values()]
        )
        scores = [list(row) for row in zip(*columns, strict=True)] if groups else []
        return reply_body(
            [self._reward(row) for row in scores],
            [next((_failure(s) for s in row if s.failure is not None), None) for row in scores],
            {
                name: [score.value for score in column]
                for name, column in zip(self._scorers, columns, strict=True)
            },
        )

    async def _scores(self, service: ScorerService, groups: Sequence[Group]) -> list[Score]:
        """All at once, so that the service can fill its batches."""
        spans = [Span(rollout=0, start=0, end=g.rollouts[0].num_tokens) for g in groups]
        calls = [service.score(g, [span]) for g, span in zip(groups, spans, strict=True)]
        return [score for scores in await asyncio.gather(*calls) for score in scores]

    def _reward(self, scores: Sequence[Score]) -> float | None:
        """None where a scorer failed, or where none applies."""
        if any(score.failure is not None for score in scores):
            return None
        weights = [scorer.weight for scorer in self._scorers.values()]
        pairs = zip(weights, scores, strict=True)
        terms = [weight * score.value for weight, score in pairs if score.value is not None]
        return sum(terms) if terms else None

    def _group(self, index: int, prompt: str, completion: str, label: str | None) -> Group:
        """A group of one; one character stands for one token."""
        size = len(completion)
        rollout = Rollout(
            index=0,
            context=np.zeros(0, np.int32),
            tokens=np.zeros(size, np.int32),
            log_probs=np.zeros(size, np.float32),
            origins=np.full(size, Origin.POLICY, np.uint8),
            versions=np.zeros(size, np.int32),
            text=completion,
            token_ends=np.arange(1, size + 1, dtype=np.int32),
            finish_reason=FinishReason.STOP,
        )
        columns: dict[str, object] = {"prompt": prompt}
        columns |= dict.fromkeys(self._label_columns, label)
        asked = Prompt(
            id="request",  # the same for all, so that equal requests are scored once
            text=prompt,
            tokens=np.zeros(0, np.int32),
            reference=label,
            columns=columns,
        )
        return Group(id=index, prompt=asked, rollouts=(rollout,))


def _failure(score: Score) -> str:
    return f"scorer {score.scorer!r}: {score.failure}"
