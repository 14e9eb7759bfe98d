"""The vLLM rollout engine: tokens in, tokens out, exact versions, weights swapped in place.

vLLM's engine is stepped by a thread of this process instead of by AsyncLLM's own process, on every
device. Measured on two CPU cores with a 0.6M model: ready 7 to 9 s after the process started
against 20 to 30 s, the same throughput (9,700 against 9,000 tokens/s), 0.6 GB less memory, and
nothing outlives the worker. Tensor parallelism adds vLLM's worker processes (executor "mp").
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig
from vllm import ModelRegistry, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from grpo.errors import BadInput, StreamBroken, WeightMismatch
from grpo.types import AdapterShape, LoadReport, Rollout, SampleRequest, WeightBundle
from grpo.weight_stream import WeightStream
from rollout_workers.adapted_layers import adapted_layers
from rollout_workers.adapter_limits import refuse_other_kind, vllm_rank
from rollout_workers.completion import NOTHING, check_room, is_complete, rollout
from rollout_workers.config import RolloutConfig
from rollout_workers.step_loop import StepLoop
from rollout_workers.tokenization import Tokenization
from rollout_workers.turns import Turn
from rollout_workers.vllm_batch import Asked, VllmBatch
from rollout_workers.vllm_weights import BACKEND, WorkerExtension

SHARED_MEMORY = Path("/dev/shm")
CPU_BLOCK_TOKENS = 32  # unit of prefix sharing; vLLM's 128 on the CPU is longer than most prompts
CPU_STEP_TOKENS = 4096  # prompt tokens of one engine step; more prompts wait for the next

# A scale for each row of a weight and for each token: the scheme of vLLM that its CPU backend can
# compute, too. Its reload rounds the weights of every swap anew.
QUANTIZATION = {None: None, "fp8": "fp8_per_channel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Swap:
    """What happened while the engine stood still; times of time.perf_counter()."""

    began: float
    loaded: float
    ended: float

    def timings_s(self, *, asked: float) -> dict[str, float]:
        return {
            "pause": self.began - asked,
            "load": self.loaded - self.began,
            "resume": self.ended - self.loaded,
        }


class VllmEngine:
    """Generates with vLLM; see `RolloutEngine` in grpo/engines.py for what the methods promise."""

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
        self._names = itertools.count()
        self._tokenization = Tokenization(model)
        self._loop = StepLoop("vllm-engine", self._build)
        self._turn = Turn(self._hand_over)

    async def start(self) -> None:
        """Build the engine; seconds to minutes."""
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "see environment.py"
        await asyncio.wrap_future(self._loop.start())

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout per request; all requests of all callers run together."""
        for request in requests:
            check_room(request, self._max_model_len)
        with _refusals():
            asked = [self._asked(request) for request in requests]
            joining = [one for one in asked if one is not None]
            try:
                await self._turn.join(joining)
                sampled = [one and await asyncio.wrap_future(one.done) for one in asked]
            finally:  # all of them have ended, unless this call was refused or given up
                self._loop.call(lambda batch: batch.abort([one.name for one in joining]))
        return [
            rollout(request, tokens or NOTHING, self._tokenization)
            for request, tokens in zip(requests, sampled, strict=True)
        ]

    def _hand_over(self, asked: Sequence[Asked]) -> None:
        self._loop.give(lambda batch: batch.add(asked), [one.done for one in asked])

    async def load_weights(self, bundle: WeightBundle) -> LoadReport:
        """Swap the weights between two steps; running requests go on under the new ones."""
        refuse_other_kind(bundle, self._adapters)
        asked = time.perf_counter()
        with contextlib.ExitStack() as files:
            image: NDArray[np.uint8] | Path = bundle.payload
            if self._config.tensor_parallel_size > 1:  # for vLLM's own worker processes
                image = await asyncio.to_thread(_write_image, bundle)
                files.callback(image.unlink)
            written = time.perf_counter()
            swap = await asyncio.wrap_future(
                self._loop.call(lambda batch: _swap(batch, image, bundle))
            )
        return LoadReport(
            version=bundle.version,
            checksum=bundle.checksum,
            timings_s={"transfer": written - asked, **swap.timings_s(asked=written)},
        )

    async def receive_weights(self, stream: WeightStream) -> Mapping[str, float]:
        """The same from a stream, with what it cost. Where it fails, requests wait for a bundle."""
        asked = time.perf_counter()
        swap = await asyncio.wrap_future(
            self._loop.call(lambda batch: _swap_streamed(batch, stream))
        )
        return swap.timings_s(asked=asked)

    async def close(self) -> None:
        """Stop the engine and free what it holds."""
        await asyncio.to_thread(self._loop.stop)

    def _asked(self, request: SampleRequest) -> Asked | None:
        """None: nothing is left to sample."""
        if is_complete(request, self._tokenization.stop_ids):
            return None
        prompt = [*request.context.tolist(), *request.guidance.tolist()]
        return Asked(name=str(next(self._names)), prompt=prompt, params=self._params(request))

    def _params(self, request: SampleRequest) -> SamplingParams:
        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens - len(request.guidance),
            seed=request.seed,
            stop_token_ids=list(self._tokenization.stop_ids),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _build(self) -> VllmBatch:
        config, adapters = self._config, self._adapters
        layers = [] if adapters is None else adapted_layers(self._model, adapters)
        if config.gpus_per_worker == 0:
            _inspect_here(self._model)
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=self._model,
                dtype=config.dtype,
                quantization=QUANTIZATION[config.quantization],
                kv_cache_dtype=config.kv_cache_dtype or "auto",
                max_model_len=self._max_model_len,
                max_num_seqs=config.max_concurrent_rollouts,
                enforce_eager=config.eager,
                enable_prefix_caching=True,
                # Of the distribution that was sampled from: log_softmax(logits / temperature),
                # renormalised over what top_p and top_k left, as the learner computes it for
                # top_p 1 and top_k 0 (v1/sample/ops/topk_topp_sampler.py). "raw_logprobs"
                # ignores the temperature. Greedy rows report temperature 1 in both modes.
                logprobs_mode="processed_logprobs",
                async_scheduling=False,  # a step would run ahead of the swap
                skip_tokenizer_init=True,
                generation_config="vllm",  # no sampling defaults from the model's folder
                disable_log_stats=True,
                use_tqdm_on_load=False,
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                tensor_parallel_size=config.tensor_parallel_size,
                distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
                **({} if adapters is None else _room_for(adapters, layers, config)),
                **(
                    _on_gpu(config)
                    if config.gpus_per_worker
                    else _on_cpu(config, self._max_model_len)
                ),
            )
        )
        batch = VllmBatch(engine)
        if adapters is not None:
            batch.prepare_adapters(layers, adapters.rank)
        return batch


def _inspect_here(model: str) -> None:
    """Have vLLM look at the model's class in this process.

    At its first start on a machine it does so in another process, to keep CUDA out of this one,
    which takes 5 to 10 s. Without a GPU there is nothing to keep out.
    """
    for architecture in AutoConfig.from_pretrained(model).architectures or []:
        if architecture in ModelRegistry.models:
            found = ModelRegistry.models[architecture].load_model_cls()
            ModelRegistry.register_model(architecture, found)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ValueError, VLLMValidationError) as error:
        raise BadInput(f"vLLM refuses the request: {error}") from error


def _swap(batch: VllmBatch, image: NDArray[np.uint8] | Path, bundle: WeightBundle) -> _Swap:
    """Runs in the engine's thread, between two steps: nothing is being generated."""
    began = time.perf_counter()
    for checksum in batch.receive(image, bundle):
        if checksum != bundle.checksum:
            raise WeightMismatch(
                f"weights of version {bundle.version} arrived in the engine with xxh3 "
                f"{checksum:016x}, but were sent with {bundle.checksum:016x}; they were not used"
            )
    loaded = time.perf_counter()
    batch.set_version(bundle.version)
    return _Swap(began=began, loaded=loaded, ended=time.perf_counter())


def _swap_streamed(batch: VllmBatch, stream: WeightStream) -> _Swap:
    """Runs in the engine's thread, too."""
    began = time.perf_counter()
    for failure in batch.receive_stream(stream):
        raise StreamBroken(failure)
    loaded = time.perf_counter()
    batch.set_version(stream.version)
    return _Swap(began=began, loaded=loaded, ended=time.perf_counter())


def _room_for(
    adapters: AdapterShape, layers: Sequence[str], config: RolloutConfig
) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": vllm_rank(adapters.rank),
        "lora_target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        # As the learner holds them; vLLM's kernels on GPUs take only the dtype of the weights.
        "lora_dtype": "auto" if config.gpus_per_worker else torch.float32,
    }


def _on_gpu(config: RolloutConfig) -> dict[str, float]:
    return {"gpu_memory_utilization": config.gpu_memory_share}


def _on_cpu(config: RolloutConfig, max_model_len: int) -> dict[str, int | bool]:
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "block_size": CPU_BLOCK_TOKENS,
        # A prompt cut in two rewinds the request's generator, which PyTorch's CPU generator
        # cannot do ("CPU Generator does not use offset"): prompts go in whole.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, CPU_STEP_TOKENS),
    }


def _write_image(bundle: WeightBundle) -> Path:
    """The weights as a file that vLLM's workers can map; in memory where there is room for it."""
    roomy = (
        SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * bundle.payload.size
    )
    folder = SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
    handle, name = tempfile.mkstemp(prefix="covey-weights-", suffix=".safetensors", dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(bundle.payload.data)
    return Path(name)
