"""What runs inside one vLLM engine: requests, which weights sampled which token, weight swaps.

Belongs to the thread of a step loop; every method is called there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from grpo.errors import UserError, WorkerLost
from grpo.types import Int32, WeightBundle
from grpo.weight_stream import WeightStream
from rollout_workers.adapter_limits import INSTEAD
from rollout_workers.completion import Sampled
from rollout_workers.vllm_adapters import THE_ADAPTERS
from rollout_workers.vllm_weights import WorkerExtension


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A request on its way into the engine."""

    name: str  # new
    prompt: list[int]
    params: SamplingParams
    done: Future[Sampled] = field(default_factory=Future)


@dataclass(slots=True, kw_only=True)
class _Running:
    """A request inside the engine."""

    done: Future[Sampled]
    starts: list[tuple[int, int]]  # (version, its first token), oldest first


class VllmBatch:
    """A vLLM engine and the requests that run in it."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._running: dict[str, _Running] = {}
        self._version = 0
        self._is_torn = False  # the weights are of no version: no token may come from them
        self._adapters: LoRARequest | None = None  # None: requests run under the weights alone
        engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})

    def prepare_adapters(self, layers: Sequence[str], rank: int) -> None:
        """Have all requests run under adapters beside these layers; they add nothing yet."""
        call = WorkerExtension.prepare_adapters.__name__
        missing = self._engine.collective_rpc(call, args=(list(layers), rank))[0]
        if missing:
            names = sorted({layer.rpartition(".")[2] for layer in missing})
            raise UserError(
                f"vLLM can put no adapter beside {', '.join(names)} of this model: leave them out "
                f"of learner.lora.target_modules, {INSTEAD}"
            )
        self._adapters = THE_ADAPTERS

    def add(self, asked: Sequence[Asked]) -> None:
        """Sample a completion for each; the error of one that vLLM refuses is its own."""
        for one in asked:
            if one.done.cancelled():
                continue
            tokens = {"prompt_token_ids": one.prompt}
            try:
                self._engine.add_request(one.name, tokens, one.params, lora_request=self._adapters)
            except (ValueError, VLLMValidationError) as error:
                if one.done.set_running_or_notify_cancel():
                    one.done.set_exception(error)
            else:
                self._running[one.name] = _Running(done=one.done, starts=[(self._version, 0)])

    def abort(self, names: Sequence[str]) -> None:
        """Forget requests that nobody waits for any more."""
        running = [name for name in names if self._running.pop(name, None) is not None]
        if running:
            self._engine.abort_request(running)

    def busy(self) -> bool:
        return not self._is_torn and bool(self._engine.has_unfinished_requests())

    def step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._finish(output)

    def shutdown(self, error: WorkerLost) -> None:
        for running in self._running.values():
            if running.done.set_running_or_notify_cancel():
                running.done.set_exception(error)
        self._running.clear()
        self._engine.engine_core.shutdown()

    def receive(self, image: NDArray[np.uint8] | Path, bundle: WeightBundle) -> list[int]:
        """Load a bundle from its image or a file of it; the checksum that each worker found.

        Where it is not the bundle's the weights stay as they were.
        """
        engine, received = self._engine, list[int]()
        if bundle.adapters is not None:
            arguments = (image, bundle.checksum, bundle.adapters)
            call = WorkerExtension.receive_adapters.__name__
            received = engine.collective_rpc(call, args=arguments)
            return received
        engine.collective_rpc("start_weight_update")
        update = {"image": image, "checksum": bundle.checksum}
        engine.collective_rpc("update_weights", kwargs={"update_info": update})
        received = engine.collective_rpc(WorkerExtension.received_checksum.__name__)
        engine.collective_rpc("finish_weight_update")
        return received

    def receive_stream(self, stream: WeightStream) -> list[str]:
        """Load a version while it is sent; why it failed, in each worker where it did.

        Requests wait from now on, until `set_version`.
        """
        engine, self._is_torn = self._engine, True
        engine.collective_rpc("start_weight_update")
        engine.collective_rpc("update_weights", kwargs={"update_info": {"stream": stream}})
        failures = engine.collective_rpc(WorkerExtension.stream_failure.__name__)
        engine.collective_rpc("finish_weight_update")
        return [failure for failure in failures if failure is not None]

    def set_version(self, version: int) -> None:
        """Tokens sampled from now on carry `version`, those of running requests too.

        Their keys and values came from the old weights: all are computed anew.
        """
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._version, self._is_torn = version, False
        for state in self._engine.output_processor.request_states.values():
            running = self._running[state.external_req_id]
            running.starts.append((version, state.detokenizer.num_output_tokens()))

    def _finish(self, output: RequestOutput) -> None:
        running = self._running.pop(output.request_id)
        if running.done.set_running_or_notify_cancel():
            running.done.set_result(_sampled(output.outputs[0], running.starts))


def _sampled(output: CompletionOutput, starts: list[tuple[int, int]]) -> Sampled:
    table = output.logprobs  # flat; at every position the sampled token comes first
    return Sampled(
        tokens=output.token_ids,
        log_probs=[table.logprobs[first] for first in table.start_indices],
        versions=_versions(starts, len(output.token_ids)),
        stopped=output.finish_reason == "stop",
    )


def _versions(starts: list[tuple[int, int]], count: int) -> Int32:
    """[count] the version of every token: starts (5, 0), (6, 2) and 3 tokens give 5, 5, 6."""
    versions = np.empty(count, np.int32)
    for version, first in starts:
        versions[first:] = version
    return versions
