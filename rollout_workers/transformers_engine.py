"""The small rollout engine: plain transformers in this process, for tiny models and comparison.

Same promises as the vLLM engine: per-request seeds, exact versions, weights swapped between two
steps. Simple where it may be slow: when requests join or weights change, all keys and values are
computed anew. Legend: B running rows, L tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from grpo.errors import UserError, WeightMismatch, WorkerLost
from grpo.types import AdapterShape, LoadReport, Rollout, SampleRequest, WeightBundle
from grpo.weight_image import tensors_in
from rollout_workers.adapter_limits import refuse_other_kind
from rollout_workers.completion import NOTHING, Sampled, check_room, is_complete, rollout
from rollout_workers.config import RolloutConfig
from rollout_workers.merged_adapters import MergedAdapters
from rollout_workers.step_loop import StepLoop
from rollout_workers.token_choice import choose
from rollout_workers.tokenization import Tokenization
from rollout_workers.turns import Turn


class TransformersEngine:
    """Generates with transformers; see `RolloutEngine` in grpo/engines.py."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        max_model_len: int,
        adapters: AdapterShape | None = None,
    ) -> None:
        """`adapters`: what all bundles hold; None: all weights."""
        self._model = model
        self._config = config
        self._max_model_len = max_model_len
        self._adapters = adapters
        self._tokenization = Tokenization(model)
        self._loop = StepLoop("transformers-engine", self._build)
        self._turn = Turn(self._hand_over)

    async def start(self) -> None:
        """Load the model."""
        await asyncio.wrap_future(self._loop.start())

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout per request; all requests of all callers run together."""
        for request in requests:
            check_room(request, self._max_model_len)
        rows = [_row(request) for request in requests]
        for row in rows:
            if is_complete(row.request, self._tokenization.stop_ids):
                row.done.set_result(NOTHING)
        try:
            await self._turn.join([row for row in rows if not row.done.done()])
            sampled = [await asyncio.wrap_future(row.done) for row in rows]
        except asyncio.CancelledError:
            for row in rows:
                row.done.cancel()
            raise
        return [
            rollout(row.request, tokens, self._tokenization)
            for row, tokens in zip(rows, sampled, strict=True)
        ]

    def _hand_over(self, rows: Sequence[_Row]) -> None:
        self._loop.give(lambda decoder: decoder.add(rows), [row.done for row in rows])

    async def load_weights(self, bundle: WeightBundle) -> LoadReport:
        """Swap the weights between two steps; running requests go on under the new ones."""
        refuse_other_kind(bundle, self._adapters)
        asked = time.perf_counter()
        began, ended = await asyncio.wrap_future(
            self._loop.call(lambda decoder: decoder.load(bundle))
        )
        return LoadReport(
            version=bundle.version,
            checksum=bundle.checksum,
            timings_s={"pause": began - asked, "load": ended - began},
        )

    async def close(self) -> None:
        """Stop the thread and free the model."""
        await asyncio.to_thread(self._loop.stop)

    def _build(self) -> _Decoder:
        return _Decoder(
            self._model,
            self._config,
            stop_ids=self._tokenization.stop_ids,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class _Row:
    """A request and what was sampled for it so far."""

    request: SampleRequest
    uniform: Tensor  # [max_tokens] one number for each token, from the request's seed
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    done: Future[Sampled] = field(default_factory=Future)

    @property
    def budget(self) -> int:
        return self.request.sampling.max_tokens - len(self.request.guidance)

    def sequence(self) -> list[int]:
        """Context, guidance and sampled tokens: what the next token depends on."""
        return [*self.request.context.tolist(), *self.request.guidance.tolist(), *self.tokens]


def _row(request: SampleRequest) -> _Row:
    generator = torch.Generator().manual_seed(request.seed)
    uniform = torch.rand(request.sampling.max_tokens, generator=generator, dtype=torch.float64)
    return _Row(request=request, uniform=uniform)


class _Decoder:
    """The model and the rows that run; belongs to the thread of a step loop."""

    def __init__(self, model: str, config: RolloutConfig, *, stop_ids: Sequence[int]) -> None:
        try:
            transformers_logging.disable_progress_bar()  # the screen is the driver's
            self._model = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, config.dtype)
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model {model} cannot be loaded by transformers: {error}") from error
        self._device = torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")
        self._model.to(self._device).eval()
        self._merged = MergedAdapters(self._model)
        self._max_rows = config.max_concurrent_rollouts
        self._stop_ids = frozenset(stop_ids)
        self._version = 0
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        # Keys and values of self._rows and the mask over them; None: to be computed anew.
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0)  # [B, L] int64, rows padded on the left

    def add(self, rows: Sequence[_Row]) -> None:
        """Sample a completion into each row's `done`."""
        self._waiting.extend(rows)

    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    @torch.inference_mode()
    def step(self) -> None:
        self._admit()
        if not self._rows:
            return
        logits = self._prefill() if self._cache is None else self._extend()
        self._append(logits)
        self._retire()

    def shutdown(self, error: WorkerLost) -> None:
        for row in [*self._rows, *self._waiting]:
            if row.done.set_running_or_notify_cancel():
                row.done.set_exception(error)
        self._rows, self._cache = [], None
        self._waiting.clear()

    @torch.no_grad()
    def load(self, bundle: WeightBundle) -> tuple[float, float]:
        """Take the weights of a bundle; when it began and ended."""
        began = time.perf_counter()
        checksum = xxhash.xxh3_64_intdigest(bundle.payload)
        if checksum != bundle.checksum:
            raise WeightMismatch(
                f"weights of version {bundle.version} arrived in the engine with xxh3 "
                f"{checksum:016x}, but were sent with {bundle.checksum:016x}; they were not used"
            )
        image = tensors_in(bundle.payload)
        if bundle.adapters is None:
            self._take_weights(image, bundle.version)
        else:
            self._merged.add(image, bundle.adapters)
        self._version = bundle.version
        self._cache = None
        return began, time.perf_counter()

    def _take_weights(self, image: Mapping[str, Tensor], version: int) -> None:
        state = self._model.state_dict()
        wanted = {name for name, _ in self._model.named_parameters()}  # a tied head counts once
        missing = sorted(wanted - image.keys())
        unknown = sorted(image.keys() - state.keys())
        if missing or unknown:
            raise WeightMismatch(
                f"weights of version {version} do not fit the model: missing {missing[:3]}, "
                f"unknown {unknown[:3]}"
            )
        for name, weight in image.items():
            state[name].copy_(weight)

    def _admit(self) -> None:
        running = [row for row in self._rows if not row.done.cancelled()]
        room = self._max_rows - len(running)
        joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        joining = [row for row in joining if not row.done.cancelled()]
        if joining or len(running) < len(self._rows):
            self._rows = running + joining
            self._cache = None

    def _prefill(self) -> Tensor:
        """[B, V] logits of the next tokens, from whole sequences."""
        sequences = [row.sequence() for row in self._rows]
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, longest - len(sequence) :] = torch.tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        self._mask = mask.to(self._device)
        self._cache = DynamicCache(config=self._model.config)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(ids.to(self._device), positions)

    def _extend(self) -> Tensor:
        """[B, V] logits of the next tokens, from the tokens sampled last."""
        last = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._device)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._forward(last, self._mask.sum(-1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _append(self, logits: Tensor) -> None:
        settings = [row.request.sampling for row in self._rows]
        device = self._device
        tokens, log_probs = choose(
            logits,
            torch.tensor([s.temperature for s in settings], device=device),
            torch.tensor([s.top_p for s in settings], device=device),
            torch.tensor([s.top_k for s in settings], device=device),
            torch.stack([row.uniform[len(row.tokens)] for row in self._rows]).to(device),
        )
        for row, token, log_prob in zip(
            self._rows, tokens.tolist(), log_probs.tolist(), strict=True
        ):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            row.versions.append(self._version)

    def _retire(self) -> None:
        """Hand over finished rows and drop them from the cache."""
        going_on = []
        for place, row in enumerate(self._rows):
            stopped = row.tokens[-1] in self._stop_ids
            if not stopped and len(row.tokens) < row.budget:
                going_on.append(place)
            elif row.done.set_running_or_notify_cancel():
                row.done.set_result(_sampled(row, stopped=stopped))
        if len(going_on) < len(self._rows):
            assert self._cache is not None
            kept = torch.tensor(going_on, dtype=torch.int64, device=self._device)
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]
            self._rows = [self._rows[place] for place in going_on]


def _sampled(row: _Row, *, stopped: bool) -> Sampled:
    return Sampled(
        tokens=row.tokens,
        log_probs=row.log_probs,
        versions=np.asarray(row.versions, np.int32),
        stopped=stopped,
    )
