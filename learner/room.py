"""Memory that does not suffice: for a micro-batch, or for what is held of the model whatever it is.

Words only: refuses to know the backend and what the driver makes of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from grpo.errors import OutOfMemory
from learner.config import LearnerConfig
from learner.packing import Block

# How PyTorch's CPU allocator names itself when it fails; it raises a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def room_for(
    block: Block, phase: str, *, max_tokens: int, is_checkpointing: bool
) -> Iterator[None]:
    """An allocator's error in the block's pass becomes OutOfMemory with the remedy."""

    def explained(error: RuntimeError) -> str:
        remedy = memory_remedy(block, max_tokens=max_tokens, is_checkpointing=is_checkpointing)
        return (
            f"memory in the {phase} of a micro-batch of {block.input_ids.numel()} tokens "
            f"({len(block.rows)} rollouts): {remedy}"
        )

    with _told(explained):
        yield


@contextmanager
def room_for_state(phase: str, config: LearnerConfig, *, has_second_model: bool) -> Iterator[None]:
    """The same where no micro-batch is to blame; `has_second_model`: a reference of its own."""

    def explained(error: RuntimeError) -> str:
        is_on_gpu = isinstance(error, torch.OutOfMemoryError)
        remedies = state_remedies(config, is_on_gpu=is_on_gpu, has_second_model=has_second_model)
        return (
            f"{'GPU' if is_on_gpu else 'host'} memory in the {phase}. Weights, gradients and "
            "optimiser state are as large whatever the micro-batch is; expected room for them. "
            f"Choose one of: {'; '.join(remedies)}; a smaller model; more memory. A run can be "
            "resumed with all but another model, lora and dtype"
        )

    with _told(explained):
        yield


@contextmanager
def _told(explained: Callable[[RuntimeError], str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0]
        raise OutOfMemory(
            f"the learner ran out of {explained(error)}. The allocator said: {said}"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator raised it, of a device or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def memory_remedy(block: Block, *, max_tokens: int, is_checkpointing: bool) -> str:
    """Which budget to lower, and to what: half of what did not fit, where rows can be parted."""
    longest = max(row.num_tokens for row in block.rows)
    if len(block.rows) > 1:
        target = max(longest, min(max_tokens, block.input_ids.numel()) // 2)
        return f"lower learner.max_tokens_per_microbatch: {max_tokens} -> {target}"
    row = block.rows[0]
    shorter = (
        f"lower sampling.max_completion_length in a new run (its completion has {len(row.tokens)} "
        f"tokens, its context {len(row.context)})"
    )
    if is_checkpointing:
        return f"one rollout alone is too long, so {shorter}"
    return (
        f"one rollout alone is too long, so set learner.gradient_checkpointing: true or {shorter}"
    )


def state_remedies(config: LearnerConfig, *, is_on_gpu: bool, has_second_model: bool) -> list[str]:
    """What makes the model's part smaller, as far as these settings do not do it already."""
    found: list[str] = []
    if is_on_gpu or not config.gpus_per_rank:
        found += _shared_out(config)
    if is_on_gpu:
        found += _moved_to_host(config, has_second_model=has_second_model)
    elif config.gpus_per_rank:
        found += _left_on_gpu(config, has_second_model=has_second_model)
    lora = config.lora
    if lora is None:
        found.append("learner.lora: {}")
    elif lora.quantization is None and lora.publish == "merged":
        found.append("learner.lora.quantization: nf4")
    # With all weights trained here bfloat16 saves nothing: float32 masters lie beside them.
    if config.dtype == "float32" and (lora is not None or (is_on_gpu and config.offload != "none")):
        found.append("learner.dtype: bfloat16")
    return found


def _shared_out(config: LearnerConfig) -> Iterator[str]:
    """Over ranks; beside adapters the frozen weights are what is large, which stage 3 cuts."""
    stage, is_lora = config.zero_stage, config.lora is not None
    if config.ranks > 1 and stage < 3:
        yield f"learner.zero_stage: {stage} -> {3 if is_lora else stage + 1}"
    more = f"learner.ranks: {config.ranks} -> {2 * config.ranks}"
    if config.backend == "torch":
        more += " with learner.backend: deepspeed"
    if stage < (3 if is_lora else 1):
        more += f" with learner.zero_stage: {3 if is_lora else 2}"
    yield more if config.gpus_per_rank else f"{more}, on more machines"


def _moved_to_host(config: LearnerConfig, *, has_second_model: bool) -> Iterator[str]:
    """What need not lie on the GPU."""
    if config.offload != "parameters":
        # The optimiser of adapters is small.
        is_optimizer = config.offload == "none" and config.lora is None
        target, least, stage = ("optimizer", 1, 2) if is_optimizer else ("parameters", 3, 3)
        moved = f"learner.offload: {target}"
        if config.backend == "torch":
            moved += " with learner.backend: deepspeed"
        if config.zero_stage < least:
            moved += f" with learner.zero_stage: {stage}"
        yield moved
    if has_second_model and not config.reference_offload:
        yield "learner.reference_offload: true"
    if config.gpus_per_rank < 1:
        yield "a lower rollout.gpu_memory_utilization, where an engine shares the GPU"


def _left_on_gpu(config: LearnerConfig, *, has_second_model: bool) -> Iterator[str]:
    """What lies in host memory by choice; images and copies of the weights have to."""
    if config.offload != "none":
        less = "optimizer" if config.offload == "parameters" else "none"
        yield f"learner.offload: {config.offload} -> {less}"
    if has_second_model and config.reference_offload:
        yield "learner.reference_offload: false"
    if config.ranks > 1:
        yield "ranks spread over more machines"
