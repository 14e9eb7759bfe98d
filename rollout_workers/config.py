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
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: vLLM rounds linear layers to 8 bits, weights as it loads them and inputs "
        "as it multiplies, each row with a scale of its own; null: not at all",
    )
    kv_cache_dtype: Literal["fp8"] | None = Field(
        None, description="of keys and values in vLLM's cache; fp8: twice as many fit; null: dtype"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and threads of one engine")
    gpus_per_worker: float = Field(
        0, ge=0, description="0: the engine runs on the CPU; 0.4: a GPU, and others share it"
    )
    max_concurrent_rollouts: int = Field(
        256, ge=1, description="completions that one engine generates at a time; more wait"
    )
    kv_cache_gib: float = Field(0.5, gt=0, description="KV cache of a vLLM engine on the CPU")
    gpu_memory_utilization: float = Field(
        0.85,
        gt=0,
        lt=1,
        description="share of each GPU that vLLM takes, KV cache included; of its part of the GPU, "
        "where gpus_per_worker is a part of one",
    )
    enforce_eager: bool | None = Field(
        None,
        description="vLLM without compiled graphs; null: on the CPU only, where compiling takes "
        "a minute and gains nothing",
    )

    weight_transport: Literal["object_store", "broadcast", "ipc"] = Field(
        "object_store",
        description="how a new version reaches the workers; object_store: one image in host memory "
        "that each of them loads; broadcast: into all vLLM engines while the learner gathers it "
        "(NCCL between GPUs, gloo on the CPU); ipc: the same, from a learner rank on the worker's "
        "own GPU (CUDA IPC); both through the object store where that fails, for new workers, and "
        "for adapters that are published alone",
    )

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs that share one copy of the weights: all that a worker has, max(1, gpus)."""
        return max(1, int(self.gpus_per_worker))

    @property
    def has_part_of_gpu(self) -> bool:
        """Whether a worker leaves room on its GPU for others."""
        return 0 < self.gpus_per_worker < 1

    @property
    def gpu_memory_share(self) -> float:
        """Of all memory of each GPU: `gpu_memory_utilization` of a worker's part."""
        return self.gpu_memory_utilization * min(1.0, self.gpus_per_worker)

    @property
    def eager(self) -> bool:
        """`enforce_eager` with its null resolved."""
        return self.gpus_per_worker == 0 if self.enforce_eager is None else self.enforce_eager

    @property
    def fp8_settings(self) -> tuple[str, ...]:
        """Those that make the sampled policy a rounding of the trained one, as recipes say them."""
        chosen = {"quantization": self.quantization, "kv_cache_dtype": self.kv_cache_dtype}
        return tuple(f"rollout.{name}: {value}" for name, value in chosen.items() if value)

    @model_validator(mode="after")
    def _several_gpus_are_whole_ones(self) -> RolloutConfig:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"rollout.gpus_per_worker is {self.gpus_per_worker:g}: set a part of one GPU, such "
                "as 0.4, or a whole number of them"
            )
        return self

    @model_validator(mode="after")
    def _direct_transport_needs_vllm(self) -> RolloutConfig:
        if self.weight_transport != "object_store" and self.engine != "vllm":
            raise ValueError(
                f"rollout.weight_transport is {self.weight_transport}, but rollout.engine is "
                f"{self.engine}: only vLLM engines load weights while they come; set "
                "weight_transport: object_store, or engine: vllm"
            )
        return self

    @model_validator(mode="after")
    def _transformers_uses_one_device(self) -> RolloutConfig:
        if self.engine == "transformers" and self.gpus_per_worker > 1:
            raise ValueError(
                f"rollout.gpus_per_worker is {self.gpus_per_worker:g}, but the transformers engine "
                "runs on one device: set it to 0 or 1, or set rollout.engine to vllm"
            )
        return self

    @model_validator(mode="after")
    def _fp8_is_vllm_s(self) -> RolloutConfig:
        if self.fp8_settings and self.engine == "transformers":
            raise ValueError(
                f"found {', '.join(self.fp8_settings)}, but the transformers engine computes in "
                "rollout.dtype alone: leave it out, or set rollout.engine to vllm"
            )
        if self.quantization is not None and self.dtype == "float32":
            raise ValueError(
                f"rollout.quantization is {self.quantization}, but rollout.dtype is float32: vLLM "
                "multiplies 8-bit weights with activations of bfloat16; set rollout.dtype: "
                "bfloat16 and learner.publish_dtype: bfloat16, or leave quantization out"
            )
        return self
