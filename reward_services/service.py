"""One scorer: collects concurrent requests into batches, judges them, and answers with Scores.

A rule is computed in place; everything else has a judge that holds its deadline, and identical
texts are judged once. A failure stays a failure with its reason and never becomes a number.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import BadInput, Transient
from grpo.types import Group, Score, Span
from reward_services.asked_rollouts import span_boundaries
from reward_services.batches import span_keys
from reward_services.config import ScorerConfig
from reward_services.judges import Judge, LearningJudge, built_judge
from reward_services.model_judge.judge import ModelJudge
from reward_services.rule_scores import score_rule
from reward_services.user_functions import Verdict


@dataclass(slots=True, kw_only=True)
class ScorerStatistics:
    """What one scorer has done so far; an actor counts for itself."""

    num_scores: int = 0
    num_failures: int = 0
    num_cached: int = 0  # answered from the cache, or twice in one request
    num_calls: int = 0  # of the judge
    num_judged: int = 0  # spans in these calls

    @property
    def hit_rate(self) -> float:
        """Scores that needed no judging, of all."""
        return self.num_cached / self.num_scores if self.num_scores else 0.0

    def batch_fill(self, batch_size: int) -> float:
        """How full the calls were on average; a group larger than a batch counts in full."""
        return self.num_judged / (self.num_calls * batch_size) if self.num_calls else 0.0

    def counters(self) -> dict[str, float]:
        """Numbers to add up over actors."""
        return {
            "num_scores": self.num_scores,
            "num_failures": self.num_failures,
            "num_cached": self.num_cached,
            "num_calls": self.num_calls,
            "num_judged": self.num_judged,
        }


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """One call of score() on its way through a batch."""

    group: Group
    spans: tuple[Span, ...]
    verdicts: list[Verdict] | None = None


class ScorerService:
    """Owns one scorer. Any number of score() calls may be under way at a time."""

    def __init__(self, config: ScorerConfig) -> None:
        self.statistics = ScorerStatistics()
        self._config = config
        self._rule = score_rule(config)
        self._judge: Judge | None = built_judge(config) if self._rule is None else None
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()  # the longest unused one first
        # What a model that learns said is not what it would say now.
        self._cache_size = 0 if config.learns else config.cache_size
        self._under_way: dict[bytes, asyncio.Future[Verdict]] = {}  # others may wait for them
        self._pending: deque[_Request] = deque()
        self._num_pending = 0  # spans in them
        self._is_full = asyncio.Event()
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Load the scorer; a function that cannot be found is a UserError."""
        if self._judge is not None:
            await self._judge.start()

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        """One score per span, in order. Failures are Scores with a reason; nothing is raised."""
        if self._rule is not None:
            scores = [self._rule(group, span) for span in spans]
        else:
            name = self._config.name
            verdicts = await self._verdicts(group, spans)
            scores = [
                Score(scorer=name, span=span, value=v.value, failure=v.failure)
                for span, v in zip(spans, verdicts, strict=True)
            ]
        self.statistics.num_scores += len(scores)
        self.statistics.num_failures += sum([score.failure is not None for score in scores])
        return scores

    def statistics_so_far(self) -> dict[str, float]:
        """Counters of this actor since it started; those of several add up.

        hit rate = num_cached / num_scores; batch fill = num_judged / (num_calls * batch_size).
        """
        own = self._judge.counts.counters() if isinstance(self._judge, ModelJudge) else {}
        return {**self.statistics.counters(), **own}

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Train the scorer's own model on the groups of a step; between two batches."""
        async with self._turn:
            return await self._learner.learn(groups)

    async def save(self, folder: Path) -> None:
        """Write what the scorer has learned."""
        async with self._turn:
            await self._learner.save(folder)

    async def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        async with self._turn:
            await self._learner.load(folder)

    @property
    def _learner(self) -> LearningJudge:
        assert isinstance(self._judge, LearningJudge), f"{self._config.name} does not learn"
        return self._judge

    async def close(self) -> None:
        """End what the scorer runs."""
        if self._judge is not None:
            await self._judge.close()

    async def _verdicts(self, group: Group, spans: Sequence[Span]) -> list[Verdict]:
        if self._cache_size:
            return await self._remembered(group, spans)
        return await self._batched(_Request(group=group, spans=tuple(spans)))

    async def _remembered(self, group: Group, spans: Sequence[Span]) -> list[Verdict]:
        """Judge each distinct text once; failures are tried anew the next time."""
        keys = self._keys(group, spans)
        found = {key: self._known[key] for key in keys if key in self._known}
        new = {key: span for key, span in zip(keys, spans, strict=True) if key not in found}
        if new and self._config.marks_boundaries:
            unknown = {span.rollout for span in new.values()}
            pairs = zip(keys, spans, strict=True)
            new = {key: span for key, span in pairs if span.rollout in unknown}
        others = {key: self._under_way[key] for key in new if key in self._under_way}
        mine = {key: span for key, span in new.items() if key not in others}
        found |= await self._judged_for_all(group, mine)
        found |= await _done(others)
        given_up = {key: new[key] for key in others if key not in found}
        found |= await self._judged_for_all(group, given_up)
        self.statistics.num_cached += len(spans) - len(mine) - len(given_up)
        for key, verdict in found.items():
            if verdict.failure is None:
                self._known[key] = verdict
                self._known.move_to_end(key)
        while len(self._known) > self._cache_size:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    async def _judged_for_all(
        self, group: Group, spans: Mapping[bytes, Span]
    ) -> dict[bytes, Verdict]:
        """Judge, and tell those who ask for the same meanwhile."""
        if not spans:
            return {}
        loop = asyncio.get_running_loop()
        mine = {key: loop.create_future() for key in spans if key not in self._under_way}
        self._under_way |= mine
        try:
            judged = await self._batched(_Request(group=group, spans=tuple(spans.values())))
            found = dict(zip(spans, judged, strict=True))
            for key, wait in mine.items():
                wait.set_result(found[key])
            return found
        finally:
            for key, wait in mine.items():
                del self._under_way[key]
                wait.cancel()  # nothing happens to one that has its result

    def _keys(self, group: Group, spans: Sequence[Span]) -> list[bytes]:
        keys = span_keys(group, spans)
        if not self._config.marks_boundaries:
            return keys
        found = span_boundaries(spans, group.scores, self._config.name)
        return [
            key + repr([end for end in found[span.rollout] if end <= span.end]).encode()
            for key, span in zip(keys, spans, strict=True)
        ]

    async def _batched(self, request: _Request) -> list[Verdict]:
        """Whoever has the turn judges a batch for all: no task in the background to lose.

        Consumes pending requests, oldest first. Waits for its turn, then at most max_wait_ms for
        company. Unblocked by whoever judged its request, or by the turn.
        """
        if not request.spans:
            return []
        self._pending.append(request)
        self._count(len(request.spans))
        try:
            async with self._turn:
                while request.verdicts is None:
                    await self._wait_for_company()
                    await self._judge_one_batch()
        finally:
            if request.verdicts is None and request in self._pending:  # cancelled while it waited
                self._pending.remove(request)
                self._count(-len(request.spans))
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
            if not await self._judge_together(batch, is_last_try=is_only_try):
                for request in batch:  # alone, so that one bad group fails only itself
                    await self._judge_alone(request)
        finally:
            unjudged = [r for r in batch if r.verdicts is None]  # only if this call was cancelled
            self._pending.extendleft(reversed(unjudged))
            self._count(sum(len(r.spans) for r in unjudged))

    def _taken(self) -> list[_Request]:
        """The oldest requests that fit into a batch together; one that is larger goes alone."""
        batch = [self._pending.popleft()]
        size = len(batch[0].spans)
        while self._pending and size + len(self._pending[0].spans) <= self._config.batch_size:
            batch.append(self._pending.popleft())
            size += len(batch[-1].spans)
        self._count(-size)
        return batch

    def _count(self, num_spans: int) -> None:
        """Keep the number of pending spans, and whether they fill a batch."""
        self._num_pending += num_spans
        if self._num_pending >= self._config.batch_size:
            self._is_full.set()
        else:
            self._is_full.clear()

    async def _judge_alone(self, request: _Request) -> None:
        tries = max(self._config.retries, 1)
        for attempt in range(tries):
            if await self._judge_together([request], is_last_try=attempt == tries - 1):
                return

    async def _judge_together(self, requests: list[_Request], *, is_last_try: bool) -> bool:
        """Whether the requests now have verdicts; on the last try a failure is the verdict."""
        assert self._judge is not None
        items = [(r.group, span) for r in requests for span in r.spans]
        self.statistics.num_calls += 1
        self.statistics.num_judged += len(items)
        try:
            verdicts = await self._judge.judged(items)
        except (BadInput, Transient) as error:
            if not is_last_try:
                return False
            verdicts = [Verdict(value=None, failure=str(error))] * len(items)
        rest = iter(verdicts)
        for request in requests:
            request.verdicts = [next(rest) for _ in request.spans]
        return True


async def _done(waits: Mapping[bytes, asyncio.Future[Verdict]]) -> dict[bytes, Verdict]:
    """What was judged for other requests; without what those gave up."""
    if waits:
        await asyncio.wait(waits.values())
    return {key: wait.result() for key, wait in waits.items() if not wait.cancelled()}
