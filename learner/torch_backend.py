"""The policy in plain PyTorch on one device. Refuses to know rows, losses and ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig
from learner.packing import Block
from learner.policy import LogProbHead, Policy, adapters_of, policy_inputs
from learner.shards import Piece, copied, restore, whole_pieces
from learner.weights import named_weights, trained_weights

T = TypeVar("T")


def adamw(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    """The optimiser of both backends; only matrices decay, not norms and biases."""
    matrices = [weight for weight in parameters if weight.ndim > 1]
    vectors = [weight for weight in parameters if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


class TorchBackend:
    """Float32 master weights beside the policy's; with dtype float32 they are the same."""

    def __init__(self, policy: Policy, config: LearnerConfig) -> None:
        self.device = torch.device("cuda" if config.gpus_per_rank else "cpu")
        self._policy = policy.to(self.device)
        self._max_grad_norm = config.max_grad_norm
        self._weights = [weight for weight in policy.parameters() if weight.requires_grad]
        self._masters = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self._weights
        ]
        self._optimizer = adamw(self._masters, config)

    def forward(
        self, block: Block, *, with_entropy: bool = False, with_hidden: bool = False
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self._policy(
            **policy_inputs(block, self.device), with_entropy=with_entropy, with_hidden=with_hidden
        )
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is master or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def step(self, learning_rate: float) -> float:
        limit = self._max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._masters, limit).item()
        if norm < float("inf"):  # False for NaN
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._copy_masters()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def collect(self, value: T) -> list[T]:
        return [value]

    def output_layer(self) -> contextlib.AbstractContextManager[LogProbHead]:
        return contextlib.nullcontext(self._policy.head)

    def whole_weights(self) -> Iterator[dict[str, Tensor]]:
        for name, weight in named_weights(self._policy.model).items():
            yield {name: self._policy.merged(name, weight)}

    def whole_adapters(self) -> Iterator[dict[str, nn.Parameter]]:
        yield adapters_of(self._policy)

    def copied_state(self) -> dict[str, Tensor]:
        return copied(self._pieces(), self._optimizer)

    def restore(self, files: Sequence[Path]) -> None:
        restore(self._pieces(), self._optimizer, files)
        self._copy_masters()

    def close(self) -> None:
        pass

    def _pieces(self) -> list[Piece]:
        """Every parameter is one piece."""
        return whole_pieces(zip(trained_weights(self._policy.model), self._masters, strict=True))

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)
