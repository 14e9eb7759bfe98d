"""A started vLLM worker with a tiny random model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grpo.types import Rollout, SampleRequest
from rollout_workers.config import RolloutConfig
from rollout_workers.environment import engine_environment
from rollout_workers.worker import RolloutWorker
from tests.unit.rollout_models import MAX_MODEL_LEN, make_model

CONFIG = RolloutConfig(max_concurrent_rollouts=64, kv_cache_gib=0.1)


@dataclass(frozen=True, slots=True)
class Served:
    """The worker and the folder of its model."""

    worker: RolloutWorker
    model: str

    def sample(self, wanted: list[SampleRequest]) -> list[Rollout]:
        return asyncio.run(self.worker.sample(wanted))


@contextmanager
def serving(folder: Path, *, tied: bool) -> Iterator[Served]:
    """Closed at the end."""
    model = make_model(folder, tied=tied)
    os.environ.update(engine_environment(CONFIG, model))
    worker = RolloutWorker(model, CONFIG, MAX_MODEL_LEN)
    asyncio.run(worker.start())
    yield Served(worker, model)
    asyncio.run(worker.close())
