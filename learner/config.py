"""Settings of the learner, under TRL's names where TRL has one.

Light on purpose: importing it loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from grpo.config import Schema
from grpo.types import AdapterShape, DType


class LoraConfig(Schema):
    """Low-rank adapters: the base stays as it is, and W + alpha / rank * B A is the policy."""

    rank: int = Field(16, ge=1, description="rows of A and columns of B (peft: r)")
    alpha: float = Field(32, gt=0, description="the adapters' product counts alpha / rank")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="layers that get adapters, by the ends of their names, as [q_proj, v_proj]; "
        "all-linear: every linear layer but the output layer",
    )
    dropout: float = Field(0.0, description="0 only: a policy with dropout is not the one sampled")
    publish: Literal["merged", "adapter"] = Field(
        "merged",
        description="what the rollout workers get; merged: all weights with the adapters added; "
        "adapter: A and B alone, which they apply beside the model's own weights",
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="how the learner holds the linear layers of the base; nf4: in 4 bits (QLoRA), "
        "with the package bitsandbytes; null: in learner.dtype",
    )

    @property
    def shape(self) -> AdapterShape:
        """What tells these adapters from others of the same model."""
        return AdapterShape(rank=self.rank, alpha=self.alpha, target_modules=self.target_modules)

    @field_validator("dropout")
    @classmethod
    def _is_off(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                f"found {value:g}; expected 0: a policy with dropout is not the one that sampled, "
                "so every importance ratio would be noise. Leave dropout out"
            )
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _is_a_list_of_names(cls, value: object) -> object:
        is_list = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        if value != "all-linear" and not is_list:
            example = value if isinstance(value, str) else "q_proj, v_proj"
            raise ValueError(
                f"found {value!r}; expected all-linear or a list of names, as [{example}]"
            )
        return value

    @field_validator("target_modules")
    @classmethod
    def _names_a_layer(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("found no name, so nothing would be trained; expected all-linear")
        return value

    @model_validator(mode="after")
    def _workers_have_the_base_of_the_learner(self) -> Self:
        if self.quantization is not None and self.publish == "adapter":
            raise ValueError(
                f"quantization is {self.quantization} and publish adapter: the rollout workers "
                "would apply the adapters to the base as it was before it was rounded, another "
                "policy than the one that is trained; set publish: merged, or leave quantization "
                "out"
            )
        return self


class LearnerConfig(Schema):
    """How the policy is held, cut into micro-batches and optimised."""

    backend: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="torch: plain PyTorch on one rank, nothing else to install"
    )
    ranks: int = Field(1, ge=1, description="processes that share the policy, one device each")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="what the ranks share out: 1 optimiser states, 2 gradients too, "
        "3 parameters too; 0: nothing",
    )
    dtype: DType = Field(
        "float32", description="of weights and activations; bfloat16 keeps float32 master weights"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train low-rank adapters of float32 in place of the weights; {}: with their "
        "defaults; null: train all weights",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="what lies in host memory and not on the GPU; optimizer: its states and master "
        "weights, where they are stepped, too; parameters: the weights as well, until a layer runs",
    )
    reference_offload: bool = Field(
        False,
        description="a reference that is a second model lies in host memory and is copied to the "
        "GPU once a step, for its passes over all micro-batches",
    )
    publish_dtype: DType | None = Field(
        None, description="of published weights, the rollout workers' dtype; null: same as dtype"
    )
    learning_rate: float = Field(
        1e-6, ge=0, le=1, description="AdamW moves each weight by about so much in a step"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after warm-up; linear and cosine fall to 0 over the run's steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of the run with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients are scaled down to this norm; 0: never"
    )
    max_tokens_per_microbatch: int = Field(
        8192,
        ge=1,
        description="tokens of one forward pass; a longer row goes alone",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="ranks that share each micro-batch, an equal part of its tokens on each "
        "(Ulysses), for rows too long for one device; ranks must be a multiple of it",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa",
        description="sdpa: torch's kernel, row by row; flash_attention_2: that of the package "
        "flash-attn, on GPUs in bfloat16; eager: written out, for models that need it",
    )
    fused_log_probs: bool | None = Field(
        None,
        description="compile the output layer's log-probabilities and entropy into one kernel each "
        "way (torch.compile); true needs triton and a C compiler on GPUs, g++ on CPUs; null: on "
        "GPUs that have them",
    )
    cpus_per_rank: int = Field(1, ge=1)
    gpus_per_rank: float = Field(
        0, ge=0, le=1, description="0: train on CPU; 0.6: a GPU, and others share it"
    )

    @property
    def rollout_dtype(self) -> DType:
        """publish_dtype, or dtype where it is not set."""
        return self.dtype if self.publish_dtype is None else self.publish_dtype

    @property
    def published_adapters(self) -> AdapterShape | None:
        """What the rollout workers make room for; None: they get all weights."""
        return self.lora.shape if self.lora is not None and self.lora.publish == "adapter" else None

    @property
    def rounds_base(self) -> bool:
        """Whether the policy is another than the one in the model's files before any step."""
        return self.lora is not None and self.lora.quantization is not None

    @property
    def row_ranks(self) -> int:
        """ranks / sequence_parallel, so many have rows of their own."""
        return self.ranks // self.sequence_parallel

    @model_validator(mode="after")
    def _torch_is_one_rank(self) -> Self:
        if self.backend == "torch" and self.ranks != 1:
            raise ValueError(
                f"backend torch runs on one rank, but ranks is {self.ranks}: "
                "set backend: deepspeed, or ranks: 1"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_its_gpu(self) -> Self:
        if self.ranks > 1 and 0 < self.gpus_per_rank <= 0.5:
            raise ValueError(
                f"gpus_per_rank is {self.gpus_per_rank:g} with {self.ranks} ranks: two would lie "
                "on one GPU, where NCCL does not let them talk; set gpus_per_rank above 0.5, such "
                "as 0.6, which leaves 0.4 to a rollout worker"
            )
        return self

    @model_validator(mode="after")
    def _flash_attention_has_its_device(self) -> Self:
        if self.attn_implementation == "flash_attention_2" and not (
            self.gpus_per_rank and self.dtype == "bfloat16"
        ):
            raise ValueError(
                f"attn_implementation is flash_attention_2, but gpus_per_rank is "
                f"{self.gpus_per_rank:g} and dtype {self.dtype}: it needs a GPU and bfloat16; set "
                "them, or attn_implementation: sdpa"
            )
        return self

    @model_validator(mode="after")
    def _sequences_are_shared_by_whole_groups(self) -> Self:
        size = self.sequence_parallel
        if size > 1 and self.backend == "torch":
            raise ValueError(
                f"sequence_parallel is {size}, but backend torch runs on one rank: set backend: "
                f"deepspeed and ranks: {size}, or leave sequence_parallel out"
            )
        if self.ranks % size:
            raise ValueError(
                f"ranks is {self.ranks} and sequence_parallel {size}: every {size} ranks share a "
                f"micro-batch; set ranks to a multiple, as {max(1, self.ranks // size) * size}"
            )
        if size > 1 and self.attn_implementation != "sdpa":
            raise ValueError(
                f"sequence_parallel is {size}, but attn_implementation is "
                f"{self.attn_implementation}: only sdpa exchanges tokens for heads between ranks; "
                "set attn_implementation: sdpa, or leave sequence_parallel out"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload != "none" and self.backend == "torch":
            raise ValueError(
                f"offload is {self.offload}, but backend torch keeps all on one device: "
                "set backend: deepspeed, or offload: none"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                "offload is optimizer, but zero_stage 0 has no optimiser of its own to move: "
                "set zero_stage: 2 (as good on one rank)"
            )
        if self.offload == "parameters" and self.zero_stage < 3:
            raise ValueError(
                f"offload is parameters, but zero_stage is {self.zero_stage} and keeps them whole "
                "on every device: set zero_stage: 3, or offload: optimizer"
            )
        return self

    @model_validator(mode="after")
    def _bfloat16_accumulates_in_float32(self) -> Self:
        # Adapters are of float32 at every stage.
        is_bfloat16 = self.dtype == "bfloat16" and self.lora is None
        if self.backend == "deepspeed" and is_bfloat16 and self.zero_stage < 2:
            raise ValueError(
                f"zero_stage is {self.zero_stage}, but with dtype bfloat16 DeepSpeed accumulates "
                "gradients in float32 from stage 2 on: set zero_stage: 2 (as good on one rank)"
            )
        return self


def heads_problem(*, heads: int, key_heads: int, sequence_parallel: int) -> str | None:
    """Why so many ranks cannot share a model's heads, with the remedy; None: they can."""
    size = sequence_parallel
    if heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0):
        return None
    works = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)
    ]
    return (
        f"learner.sequence_parallel is {size}, but the model has {heads} attention heads and "
        f"{key_heads} key-value heads, which {size} ranks cannot share out evenly: set it to one "
        f"of {', '.join(map(str, works))}"
    )
