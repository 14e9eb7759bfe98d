"""One scorer: collects concurrent requests into batches, judges them, and answers with Scores.

A rule is computed in place; a user function runs in a process that is killed and replaced when it
misses its deadline. A failure stays a failure with its reason and never becomes a number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.errors import BadInput, Transient
from grpo.types import Group, Rollout, Score, Span
from reward_services.config import ScorerConfig
from reward_services.function_process import FunctionProcess
from reward_services.rules import Rule, built_rule
from reward_services.user_functions import Batch, Verdict


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """One call of score() on its way through a batch."""

    group: Group
    spans: tuple[Span, ...]
    verdicts: list[Verdict] | None = None


class ScorerService:
    """Owns one scorer. Any number of score() calls may be under way at a time."""

    def __init__(self, config: ScorerConfig) -> None:
        self._config = config
        self._rule: Rule | None = built_rule(config) if config.rule is not None else None
        self._process = FunctionProcess(config.function) if config.function is not None else None
        self._pending: list[_Request] = []
        self._is_full = asyncio.Event()
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Load the scorer; a function that cannot be found is a UserError."""
        if self._process is not None:
            await asyncio.to_thread(self._process.start)

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        """One score per span, in order. Failures are Scores with a reason; nothing is raised."""
        if self._rule is not None:
            verdicts = [_ruled(self._rule, group, span) for span in spans]
        else:
            verdicts = await self._batched(_Request(group=group, spans=tuple(spans)))
        return [
            Score(scorer=self._config.name, span=span, value=v.value, failure=v.failure)
            for span, v in zip(spans, verdicts, strict=True)
        ]

    async def close(self) -> None:
        """End the process of a user function."""
        if self._process is not None:
            await asyncio.to_thread(self._process.kill)

    async def _batched(self, request: _Request) -> list[Verdict]:
        """Whoever has the turn judges a batch for all: no task in the background to lose.

        Consumes pending requests, oldest first. Waits for its turn, then at most max_wait_ms for
        company. Unblocked by whoever judged its request, or by the turn.
        """
        if not request.spans:
            return []
        self._pending.append(request)
        if self._num_pending() >= self._config.batch_size:
            self._is_full.set()
        try:
            async with self._turn:
                while request.verdicts is None:
                    await self._wait_for_company()
                    await self._judge_one_batch()
        finally:
            if request in self._pending:
                self._pending.remove(request)
        assert request.verdicts is not None
        return request.verdicts

    async def _wait_for_company(self) -> None:
        try:
            async with asyncio.timeout(self._config.max_wait_ms / 1000):
                await self._is_full.wait()
        except TimeoutError:
            pass

    async def _judge_one_batch(self) -> None:
        """Judge the oldest requests; among them, soon, is that of whoever has the turn."""
        batch = self._taken()
        is_only_try = len(batch) == 1 and self._config.retries == 0
        try:
            if not await self._judge(batch, is_last_try=is_only_try):
                for request in batch:  # alone, so that one bad group fails only itself
                    await self._judge_alone(request)
        finally:
            unjudged = [r for r in batch if r.verdicts is None]  # only if this call was cancelled
            self._pending = unjudged + self._pending

    def _taken(self) -> list[_Request]:
        batch = [self._pending.pop(0)]
        while self._pending and (
            sum(len(r.spans) for r in [*batch, self._pending[0]]) <= self._config.batch_size
        ):
            batch.append(self._pending.pop(0))
        if self._num_pending() < self._config.batch_size:
            self._is_full.clear()
        return batch

    async def _judge_alone(self, request: _Request) -> None:
        tries = max(self._config.retries, 1)
        for attempt in range(tries):
            if await self._judge([request], is_last_try=attempt == tries - 1):
                return

    async def _judge(self, requests: list[_Request], *, is_last_try: bool) -> bool:
        """Whether the requests now have verdicts; on the last try a failure is the verdict."""
        assert self._process is not None
        batch = joined([(r.group, span) for r in requests for span in r.spans])
        try:
            verdicts = await asyncio.to_thread(
                self._process.judged, batch, deadline_s=self._config.deadline_s
            )
        except (BadInput, Transient) as error:
            if not is_last_try:
                return False
            verdicts = [Verdict(value=None, failure=str(error))] * len(batch)
        except asyncio.CancelledError:
            self._process.kill()  # its late answer would be taken for the next request's
            raise
        rest = iter(verdicts)
        for request in requests:
            request.verdicts = [next(rest) for _ in request.spans]
        return True

    def _num_pending(self) -> int:
        return sum(len(r.spans) for r in self._pending)


def span_text(rollout: Rollout, span: Span) -> str:
    """The characters of a span: an outcome's whole text, a prefix, or one step."""
    if span.start == 0 and span.end == rollout.num_tokens:
        return rollout.text
    first = int(rollout.token_ends[span.start - 1]) if span.start else 0
    return rollout.text[first : int(rollout.token_ends[span.end - 1]) if span.end else 0]


def joined(items: Sequence[tuple[Group, Span]]) -> Batch:
    """The parallel lists that a user function gets."""
    groups = [group for group, _ in items]
    rollouts = [group.rollouts[span.rollout] for group, span in items]
    spans = [span for _, span in items]
    texts = [span_text(r, s) for r, s in zip(rollouts, spans, strict=True)]
    prompts = [_user_prompt(group) for group in groups]
    names = {name: None for group in groups for name in group.prompt.columns}  # in order
    return Batch(
        prompts=prompts,
        completions=[
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        completion_ids=[
            r.tokens[s.start : s.end].tolist() for r, s in zip(rollouts, spans, strict=True)
        ],
        prompt_texts=[group.prompt.text for group in groups],
        completion_texts=texts,
        references=[group.prompt.reference for group in groups],
        columns={
            name: [g.prompt.columns.get(name, None) for g in groups]
            for name in names
            if name not in ("prompt", "completion", "completion_ids")  # TRL passes these as lists
        },
    )


def _user_prompt(group: Group) -> object:
    columns = group.prompt.columns
    return columns.get("prompt", group.prompt.text)


def _ruled(rule: Rule, group: Group, span: Span) -> Verdict:
    reference = group.prompt.reference
    if reference is None:
        return Verdict(value=None, failure=f"prompt {group.prompt.id} has no reference answer")
    try:
        return Verdict(value=rule(span_text(group.rollouts[span.rollout], span), reference))
    except ValueError as error:
        return Verdict(value=None, failure=f"prompt {group.prompt.id}: {error}")
