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
from learner.model_parts import ModelParts
from learner.packing import Block
from learner.policy import Adapters, Policy, policy_inputs
from learner.weights import named_weights


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
    """Holds a policy that no optimiser touches, whole on every rank or a part on each.

    With `is_offloaded` it lies in host memory and is copied to the device for its passes alone.
    Cut into parts, all ranks run its passes and all that reads or moves its averages together.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        device: torch.device,
        is_moving: bool,
        is_offloaded: bool,
        is_cut: bool = False,
    ) -> None:
        self._policy = policy.requires_grad_(False).eval()
        self._device = device
        self._is_offloaded = is_offloaded
        weights = named_weights(self._policy.model)
        self._parts = ModelParts(self._policy) if is_cut else None  # None: all of it is here
        if not is_offloaded:
            for tensor in self._tensors():
                tensor.data = tensor.data.to(device)
        elif device.type == "cuda":  # locked pages are copied several times as fast
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory()
        self._weights = weights
        self._held = {name: self._of_this_rank(weight) for name, weight in weights.items()}
        # In bfloat16 a step of 0.5 % would be rounded away. Float32 weights are their own average.
        self._averages = (
            {name: _at_least_float32(held) for name, held in self._held.items()}
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
                average, followed = self._averages[name], self._cut(name, weight)
                if average.is_floating_point():
                    average.lerp_(followed.to(average), 1.0 - decay)
                else:
                    average.copy_(followed)
        self._copy_averages()

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """Every average by name, whole, one at a time; nothing where the reference stays."""
        for name, average in self._averages.items():
            weight = self._weights[name]
            if self._parts is None or self._held[name] is weight:
                yield name, average
            else:
                yield name, self._parts.whole(average, weight)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from the whole averages of any ranks."""
        for name, average in self._averages.items():
            average.copy_(self._cut(name, saved[name]))
        self._copy_averages()

    def _tensors(self) -> Iterator[Tensor]:
        """What this rank keeps between passes."""
        weights = self._policy.parameters() if self._parts is None else self._parts.tensors()
        return chain(weights, self._policy.buffers())

    def _of_this_rank(self, weight: Tensor) -> Tensor:
        part = None if self._parts is None else self._parts.part(weight)
        return weight if part is None else part

    def _cut(self, name: str, whole: Tensor) -> Tensor:
        is_whole = self._held[name] is self._weights[name]
        return whole if self._parts is None or is_whole else self._parts.cut(whole)

    def _copy_averages(self) -> None:
        for name, held in self._held.items():
            if held is not self._averages[name]:
                held.copy_(self._averages[name])


def _at_least_float32(weight: Tensor) -> Tensor:
    if weight.is_floating_point() and weight.dtype != torch.float32:
        return weight.detach().float()
    return weight
