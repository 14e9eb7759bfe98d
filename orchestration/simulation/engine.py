"""A rollout worker that only waits: places, a speed, a pause for new weights.

Completions are random tokens of the drawn lengths under the versions that would have sampled
them. Time is the event loop's. Refuses to know groups, scores and the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapreplace

import numpy as np

from grpo.types import FinishReason, Int32, LoadReport, Origin, Rollout, SampleRequest, WeightRef
from orchestration.simulation.services import ServiceCpu, Services

STOP, FIRST_TOKEN, VOCABULARY = 2, 3, 1000
OFFSETS = 1 << 16  # places in the random tokens at which a completion may begin
LINE = "a line of the simulated answer\n"
LOG_PROB = -1.0  # engine and learner agree
TINY_S = 1e-9  # the event loop's resolution


def random_tokens(max_tokens: int) -> Int32:
    """Enough for a completion of so many tokens at each offset; the same in every run."""
    rng = np.random.default_rng(0)
    return rng.integers(FIRST_TOKEN, VOCABULARY, OFFSETS + max_tokens).astype(np.int32)


@dataclass(slots=True, eq=False)
class _Call:
    """Rollouts that one call asked for; times are the worker's decoding clock."""

    version: int  # at the beginning
    begin: list[float] = field(default_factory=list)  # of each rollout
    end: float = 0.0  # of the last one
    swaps: list[tuple[float, int]] = field(default_factory=list)  # new version since


class SimulatedEngine:
    """A rollout worker: so many places, a fixed speed in each, a pause for new weights.

    Its decoding clock stands still while weights are loaded: rollouts in flight go on behind it.
    """

    def __init__(self, services: Services, cpu: ServiceCpu, random_tokens: Int32) -> None:
        """`random_tokens`: the engine cuts completions out of them."""
        self._services = services
        self._cpu = cpu
        self._time = asyncio.get_running_loop().time
        self._version = 0
        self._free_at = [0.0] * services.places  # heap: when each place is next free
        self._calls: set[_Call] = set()
        self._given_s = 0.0  # seconds of work given to places so far
        self._paused_s = 0.0  # in all pauses that are over
        self._pause_began: float | None = None
        self._runs = asyncio.Event()
        self._runs.set()
        self._random_tokens = random_tokens

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """First come, first served: each rollout takes the place that is free first."""
        call = _Call(self._version)
        with self._cpu.counted():
            sizes = [self._size(request) for request in requests]
            for request, size in zip(requests, sizes, strict=True):
                seconds = (size - len(request.guidance)) / self._services.tokens_per_s
                begin = max(self._decoding_time(), self._free_at[0])
                heapreplace(self._free_at, begin + seconds)
                self._given_s += seconds
                call.begin.append(begin)
                call.end = max(call.end, begin + seconds)
        self._calls.add(call)
        try:
            await self._decoded(call.end)
        finally:
            self._calls.remove(call)
        with self._cpu.counted():
            return [
                self._rollout(request, size, begin, call)
                for request, size, begin in zip(requests, sizes, call.begin, strict=True)
            ]

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        """Every rollout in flight goes on with the new weights."""
        self._pause_began = self._time()
        self._runs.clear()
        try:
            await asyncio.sleep(self._services.load_s)
        finally:
            self._paused_s += self._time() - self._pause_began
            self._pause_began = None
            self._runs.set()
        self._version = ref.version
        for call in self._calls:
            call.swaps.append((self._decoding_time(), ref.version))
        return LoadReport(version=ref.version, checksum=ref.checksum, timings_s={})

    @property
    def busy_s(self) -> float:
        """Seconds that places have worked so far, added up."""
        now = self._decoding_time()
        return self._given_s - sum(max(0.0, free_at - now) for free_at in self._free_at)

    def _decoding_time(self) -> float:
        now = self._time() if self._pause_began is None else self._pause_began
        return now - self._paused_s

    async def _decoded(self, end: float) -> None:
        while (left := end - self._decoding_time()) > TINY_S:
            await self._runs.wait()
            await asyncio.sleep(left)

    def _size(self, request: SampleRequest) -> int:
        """Tokens of the completion; nothing is sampled behind a stop token."""
        given = len(request.guidance)
        if given and request.guidance[-1] == STOP:
            return given
        drawn = self._services.length(request.group, request.seed)
        return max(given + 1, min(drawn, request.sampling.max_tokens))

    def _rollout(self, request: SampleRequest, size: int, begin: float, call: _Call) -> Rollout:
        given, start = len(request.guidance), request.seed % OFFSETS
        tokens = self._random_tokens[start : start + size].copy()
        tokens[:given] = request.guidance
        is_cut = size == request.sampling.max_tokens
        if size > given and not is_cut:
            tokens[-1] = STOP
        log_probs = np.full(size, LOG_PROB, np.float32)
        origins = np.full(size, Origin.POLICY, np.uint8)
        versions = np.full(size, call.version, np.int32)
        for at, version in call.swaps:
            decoded = given + int((at - begin) * self._services.tokens_per_s)
            versions[max(0, decoded) :] = version
        log_probs[:given], origins[:given], versions[:given] = 0.0, Origin.GUIDANCE, -1
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=tokens,
            log_probs=log_probs,
            origins=origins,
            versions=versions,
            text=(LINE * (size // len(LINE) + 1))[:size],
            token_ends=np.arange(1, size + 1, dtype=np.int32),
            finish_reason=FinishReason.LENGTH if is_cut else FinishReason.STOP,
        )
