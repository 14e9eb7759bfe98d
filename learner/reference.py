"""The reference policy: the initial one, or a moving average that follows the policy.

Refuses to know when it is asked to follow, and the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from learner.backend import Backend
from learner.packing import Block
from learner.policy import Adapters, Policy, policy_inputs
from learner.weights import named_weights, to_cpu


class WithoutAdapters:
    """The initial policy where adapters are trained: the policy with them off, no second model.

    Under ZeRO-3 a pass is collective, as the policy's own are.
    """

    def __init__(self, backend: Backend, adapters: Adapters) -> None:
        self._backend = backend
        self._adapters = adapters

    def at_hand(self) -> AbstractContextManager[None]:
        """Always: there is nothing to move."""
        return nullcontext()

    @torch.no_grad()
    def log_probs(self, block: Block) -> Tensor:
        """[N] of the block's completion tokens."""
        with self._adapters.disabled():
            return self._backend.forward(block)[0]


class Reference:
    """Holds a policy that no optimiser touches, whole on every rank.

    With `is_offloaded` it lies in host memory and is copied to the device for its passes alone.
    """

    def __init__(
        self, policy: Policy, *, device: torch.device, is_moving: bool, is_offloaded: bool
    ) -> None:
        self._policy = policy.requires_grad_(False).eval()
        self._device = device
        self._is_offloaded = is_offloaded
        if not is_offloaded:
            self._policy.to(device)
        elif device.type == "cuda":  # locked pages are copied several times as fast
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory()
        self._weights = named_weights(self._policy.model)
        # In bfloat16 a step of 0.5 % would be rounded away. Float32 weights are their own average.
        self._averages = (
            {name: _at_least_float32(weight) for name, weight in self._weights.items()}
            if is_moving
            else {}
        )

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """On the device until the context ends; host memory keeps its copy, which nothing changes.

        Around all passes of a step: the way to the device takes longer than a micro-batch.
        """
        if not self._is_offloaded:
            yield
            return
        on_host = [(tensor, tensor.data) for tensor in self._tensors()]
        for tensor, values in on_host:
            tensor.data = values.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, values in on_host:
                tensor.data = values

    @torch.no_grad()
    def log_probs(self, block: Block) -> Tensor:
        """[N] of the block's completion tokens; inside `at_hand` only."""
        log_probs: Tensor = self._policy(**policy_inputs(block, self._device))[0]
        return log_probs

    @torch.no_grad()
    def follow(self, weights: Iterable[Mapping[str, Tensor]], *, decay: float) -> None:
        """r <- decay * r + (1 - decay) * p. decay 0.995, p = 2, r = 1: 1.005; decay 0: a copy."""
        for part in weights:
            for name, weight in part.items():
                average = self._averages[name]
                if average.is_floating_point():
                    average.lerp_(weight.to(average), 1.0 - decay)
                else:
                    average.copy_(weight)
        self._copy_averages()

    def copied(self) -> dict[str, Tensor]:
        """The averages on CPU, as no later step changes them; empty where nothing moves."""
        return {name: to_cpu(average, average.dtype) for name, average in self._averages.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from averages that `copied` returned."""
        for name, average in self._averages.items():
            average.copy_(saved[name])
        self._copy_averages()

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self._policy.parameters(), self._policy.buffers())

    def _copy_averages(self) -> None:
        for name, weight in self._weights.items():
            if weight is not self._averages[name]:
                weight.copy_(self._averages[name])


def _at_least_float32(weight: Tensor) -> Tensor:
    if weight.is_floating_point() and weight.dtype != torch.float32:
        return weight.detach().float()
    return weight
