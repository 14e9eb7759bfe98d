"""The policy in DeepSpeed, ZeRO 0 to 3. The only file that imports deepspeed.

Refuses to know rows and losses. Every method is collective: all ranks call it together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed
from torch import Tensor, nn

from learner.config import LearnerConfig
from learner.packing import Block
from learner.policy import LogProbHead, Policy, adapters_of, policy_inputs
from learner.sequence_parallel import joined_groups
from learner.shards import Piece, copied, restore, whole_pieces
from learner.torch_backend import adamw
from learner.weights import named_weights, trained_weights

T = TypeVar("T")
GATHER_ELEMENTS = 2**28  # parameters gathered at once under ZeRO-3: 1 GiB in float32
BUCKET_ELEMENTS = 2**27  # gradients reduced at once; DeepSpeed allocates this much
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that waits longer has lost a peer


class DeepSpeedBackend:
    """One rank's part of the policy; the environment says which rank it is."""

    def __init__(self, policy: Policy, config: LearnerConfig) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls collectives by names that this torch has renamed: once per process, noise.
        warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
        if config.gpus_per_rank:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            # Compiling this op takes half a minute and a compiler; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._owns_group = not torch.distributed.is_initialized()
        deepspeed.init_distributed(
            dist_backend="nccl" if config.gpus_per_rank else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            verbose=False,
        )
        self._row_ranks: torch.distributed.ProcessGroup | None = None  # None: all of them
        if config.sequence_parallel > 1:
            policy.sequence_group, self._row_ranks = joined_groups(
                config.sequence_parallel, timeout=COLLECTIVE_TIMEOUT
            )
        self._config = config
        self._policy = policy
        self._parameters = [weight for weight in policy.parameters() if weight.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=adamw(self._parameters, config),
            config=engine_config(policy, config),
        )
        self._rank = torch.distributed.get_rank()
        self._world_size = torch.distributed.get_world_size()

    def forward(
        self, block: Block, *, with_entropy: bool = False, with_hidden: bool = False
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self._engine(
            **policy_inputs(block, self.device), with_entropy=with_entropy, with_hidden=with_hidden
        )
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages gradients over all ranks, but each has a part of one sum: from its rows
        # and, in a sequence group, whose ranks all have the same loss, from its tokens. It also
        # divides by gradient_accumulation_steps, which is 1 whatever the number of micro-batches.
        self._engine.backward(loss * self._world_size)

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._config.zero_stage == 0:
            return self._step_unsharded()
        self._engine.step()
        # ZeRO skips an update whose norm is not finite and then reports infinity.
        return float(self._engine.get_global_grad_norm())

    def _step_unsharded(self) -> float:
        limit = self._config.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters, limit).item()
        if norm < float("inf"):  # False for NaN
            self._engine.step()
        self._engine.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        total = values.to(self.device)
        torch.distributed.all_reduce(total, group=self._row_ranks)
        return total

    def collect(self, value: T) -> list[T]:
        values: list[Any] = [None] * torch.distributed.get_world_size(self._row_ranks)
        torch.distributed.all_gather_object(values, value, group=self._row_ranks)
        return values

    @contextlib.contextmanager
    def output_layer(self) -> Iterator[LogProbHead]:
        head = self._policy.head
        with self._gathered([weight for weight in (head.weight, head.bias) if weight is not None]):
            yield head

    def whole_weights(self) -> Iterator[dict[str, Tensor]]:
        for names in self._whole_buckets():
            for name, weight in names.items():
                yield {name: self._policy.merged(name, weight)}

    def whole_adapters(self) -> Iterator[dict[str, nn.Parameter]]:
        weights = adapters_of(self._policy)
        with self._gathered(list(weights.values())):
            yield weights

    def copied_state(self) -> dict[str, Tensor]:
        if self._config.zero_stage == 0 and self._rank > 0:
            return {}  # every rank holds the same
        return copied(self._pieces(), self._torch_optimizer)

    def restore(self, files: Sequence[Path]) -> None:
        restore(self._pieces(), self._torch_optimizer, files)
        optimizer = self._engine.optimizer
        if self._config.zero_stage == 3:
            optimizer.checkpoint_event_prologue()  # all parameters in parts
            for sub_group in range(len(optimizer.fp16_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            optimizer.checkpoint_event_epilogue()  # those that stay whole, whole again
        elif self._config.zero_stage > 0:
            optimizer.update_lp_params()

    def close(self) -> None:
        self._engine.destroy()
        if self._owns_group:
            torch.distributed.destroy_process_group()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        inner: torch.optim.Optimizer = optimizer.optimizer if self._config.zero_stage else optimizer
        return inner

    def _pieces(self) -> list[Piece]:
        """What this rank optimises: DeepSpeed flattens parameters and cuts them by ranks."""
        weights = trained_weights(self._policy.model)
        if self._config.zero_stage == 0:
            return whole_pieces(weights.items())
        if self._config.zero_stage < 3:
            optimizer = self._engine.optimizer
            return [
                Piece(
                    name=name,
                    start=mapping.lp_fragment_address.start,
                    num_elements=mapping.lp_fragment_address.numel,
                    flat=optimizer.single_partition_of_fp32_groups[mapping.param_group_index],
                    offset=mapping.hp_fragment_address.start,
                )
                for name, weight in weights.items()
                if (mapping := weight._hp_mapping) is not None  # None: with other ranks
            ]
        return [piece for item in weights.items() if (piece := self._part(*item)) is not None]

    def _part(self, name: str, weight: nn.Parameter) -> Piece | None:
        """ZeRO-3 cuts every parameter into equal parts; padding may leave the last ranks none."""
        optimizer = self._engine.optimizer
        sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = self._rank * size
        if start >= weight.ds_numel:
            return None
        return Piece(
            name=name,
            start=start,
            num_elements=min(size, weight.ds_numel - start),
            flat=optimizer.fp32_partitioned_groups_flat[sub_group],
            offset=offset,
        )

    def _whole_buckets(self) -> Iterator[dict[str, Tensor]]:
        """Buckets that are whole on every rank until the next one, and all adapters with them."""
        adapters = self._policy.adapters
        with self._gathered([] if adapters is None else [*adapters.weights()]):
            for names in self._buckets():
                with self._gathered(list(names.values())):
                    yield names

    def _buckets(self) -> Iterator[dict[str, Tensor]]:
        """All weights by name, in order, GATHER_ELEMENTS or one weight at a time."""
        bucket: dict[str, Tensor] = {}
        num_elements = 0
        for name, weight in named_weights(self._policy.model).items():
            size = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 empties the tensor itself
            if bucket and num_elements + size > GATHER_ELEMENTS:
                yield bucket
                bucket, num_elements = {}, 0
            bucket[name] = weight
            num_elements += size
        yield bucket

    def _gathered(self, weights: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
        if self._config.zero_stage < 3:
            return contextlib.nullcontext()
        parameters = [weight for weight in weights if isinstance(weight, nn.Parameter)]
        return deepspeed.zero.GatheredParameters(parameters)


def engine_config(policy: Policy, config: LearnerConfig) -> dict[str, Any]:
    """What DeepSpeed is told; batch sizes are placeholders, since we own the micro-batches."""
    num_elements = sum(weight.numel() for weight in policy.parameters())
    bucket = min(num_elements, BUCKET_ELEMENTS)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled for a minute
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # Keeps norms and biases whole on every rank, and nothing larger.
            "stage3_param_persistence_threshold": 10 * policy.model.config.hidden_size,
        },
    }
    host = {"device": "cpu", "pin_memory": config.gpus_per_rank > 0}
    if config.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = host
    if config.offload == "parameters":
        settings["zero_optimization"]["offload_param"] = host
    if not config.gpus_per_rank:
        settings["zero_optimization"]["overlap_comm"] = False  # gloo has no streams
    # DeepSpeed would make the adapters bfloat16, too; without it the frozen weights stay as read.
    if config.dtype == "bfloat16" and config.lora is None:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
