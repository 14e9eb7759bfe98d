"""Settings of the rollout workers. Light: importing it loads neither torch nor vLLM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo.config import Schema
from grpo.types import DType


class RolloutConfig(Schema):
    """How many rollout workers there are and what each of them may use."""

    engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="transformers is small and slow: for tiny models and for comparison"
    )
    workers: int = Field(1, ge=1, description="engines, each with a full copy of the policy")
    dtype: DType = Field(
        "float32", description="of the weights; bfloat16 halves memory on GPUs and costs exactness"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and threads of one engine")
    gpus_per_worker: int = Field(0, ge=0, description="0: the engine runs on the CPU")
    max_concurrent_rollouts: int = Field(
        256, ge=1, description="completions that one engine generates at a time; more wait"
    )
    kv_cache_gib: float = Field(0.5, gt=0, description="KV cache of a vLLM engine on the CPU")
    gpu_memory_utilization: float = Field(
        0.85, gt=0, lt=1, description="share of each GPU that vLLM takes, KV cache included"
    )
    enforce_eager: bool | None = Field(
        None,
        description="vLLM without compiled graphs; null: on the CPU only, where compiling takes "
        "a minute and gains nothing",
    )

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs that share one copy of the weights: all that a worker has, max(1, gpus)."""
        return max(1, self.gpus_per_worker)

    @property
    def eager(self) -> bool:
        """`enforce_eager` with its null resolved."""
        return self.gpus_per_worker == 0 if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _transformers_uses_one_device(self) -> RolloutConfig:
        if self.engine == "transformers" and self.gpus_per_worker > 1:
            raise ValueError(
                f"rollout.gpus_per_worker is {self.gpus_per_worker}, but the transformers engine "
                "runs on one device: set it to 0 or 1, or set rollout.engine to vllm"
            )
        return self
