"""One rollout worker: an engine behind the errors of grpo.errors. Knows nothing of Ray.

Engines raise the kinds of grpo.errors: WorkerLost when they break or were closed (a worker that
is lost stays so: replace it), BadInput for a request that none would take. What else comes out of
them is sorted here, where the cause is still known.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

from grpo.errors import CoveyError, Fatal, UserError
from grpo.types import AdapterShape, LoadReport, Rollout, SampleRequest, WeightBundle
from rollout_workers.config import RolloutConfig
from rollout_workers.environment import engine_environment
from rollout_workers.turns import Gate, Together

if TYPE_CHECKING:
    from grpo.weight_stream import WeightStream


class Engine(Protocol):
    """What VllmEngine and TransformersEngine have in common."""

    async def start(self) -> None: ...

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]: ...

    async def load_weights(self, bundle: WeightBundle) -> LoadReport: ...

    async def close(self) -> None: ...


class StreamEngine(Protocol):
    """What VllmEngine has beside it."""

    async def receive_weights(self, stream: WeightStream) -> Mapping[str, float]: ...


class RolloutWorker:
    """Generates rollouts with one engine; `start` before anything else."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        max_model_len: int,
        adapters: AdapterShape | None = None,
    ) -> None:
        """`adapters`: what all bundles hold; None: all weights."""
        self._adapters = adapters
        self._model = model
        self._config = config
        self._max_model_len = max_model_len
        self._engine: Engine | None = None
        self._gate = Gate()

    async def start(self) -> None:
        """Load the engine and the model; seconds on a CPU, minutes for a large model."""
        what = f"the rollout engine cannot start with model {self._model}"
        with _classified(what, (ValueError, OSError), UserError):
            self._engine = await asyncio.to_thread(
                _engine, self._model, self._config, self._max_model_len, self._adapters
            )
            await self._engine.start()

    async def sample(
        self, requests: Sequence[SampleRequest], together: Together | None = None
    ) -> list[Rollout]:
        """One rollout per request, in order; may be called again before the last call ended.

        `together`: what else was asked for with it, which an actor hears of one by one.
        """
        if together is not None:
            await self._gate.passed(together)
        with _classified("rollouts could not be sampled"):
            return await self._started().sample(requests)

    async def load_weights(self, bundle: WeightBundle) -> LoadReport:
        """Swap the weights; tokens sampled from now on carry the new version."""
        with _classified(f"weights of version {bundle.version} could not be loaded"):
            return await self._started().load_weights(bundle)

    async def receive_weights(self, stream: WeightStream) -> Mapping[str, float]:
        """The same from a stream, with the seconds of its phases. StreamBroken: load a bundle."""
        with _classified(f"weights of version {stream.version} could not be received"):
            # Schema: only the vLLM engine is asked (rollout.weight_transport).
            return await cast(StreamEngine, self._started()).receive_weights(stream)

    async def close(self) -> None:
        """Free the engine; the worker cannot be started again."""
        if self._engine is not None:
            await self._engine.close()

    def _started(self) -> Engine:
        assert self._engine is not None, "call start() first"
        return self._engine


def _engine(
    model: str, config: RolloutConfig, max_model_len: int, adapters: AdapterShape | None
) -> Engine:
    # Imported here because each costs seconds and a worker needs only one of them. vLLM reads
    # the environment when it is imported; who started this process may have set it already.
    if config.engine == "transformers":
        from rollout_workers.transformers_engine import TransformersEngine

        return TransformersEngine(model, config, max_model_len, adapters)
    for name, value in engine_environment(config, model).items():
        os.environ.setdefault(name, value)
    from rollout_workers.vllm_window import require_vllm

    # Before the import below, which an older vLLM would fail.
    require_vllm(with_adapters=adapters is not None)
    from rollout_workers.vllm_engine import VllmEngine

    return VllmEngine(model, config, max_model_len, adapters)


@contextmanager
def _classified(
    what: str, mistakes: tuple[type[Exception], ...] = (), meaning: type[CoveyError] = Fatal
) -> Iterator[None]:
    """Errors of the kinds `mistakes` become `meaning`; what nobody classified is a bug: Fatal."""
    try:
        yield
    except CoveyError:
        raise
    except mistakes as error:
        raise meaning(f"{what}: {error}") from error
    except Exception as error:
        raise Fatal(f"{what}: {type(error).__name__}: {error}") from error
