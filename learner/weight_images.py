"""Weights on their way to the rollout workers: each version is copied once, into its image.

Refuses to know the optimiser, the ranks and who reads an image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from grpo.types import AdapterShape, WeightBundle
from grpo.weight_image import image_header, tensors_in
from learner.weight_sender import WeightSender
from learner.weights import as_saved, copy_weights, empty_weights, named_weights, to_cpu

Weights = dict[str, Tensor]


def model_images(model: PreTrainedModel, dtype: torch.dtype) -> WeightImages:
    """Of all weights of a model, which must still be whole."""
    return WeightImages(empty_weights(model, dtype), as_saved=partial(as_saved, model))


def is_saved_as_named(model: PreTrainedModel) -> bool:
    """Whether transformers saves every weight of a model, still whole, as the model has it."""
    weights = {n: torch.empty_like(w, device="meta") for n, w in named_weights(model).items()}
    return _are_same(as_saved(model, weights), weights)


def pass_on(
    parts: Iterable[Mapping[str, Tensor]],
    sender: WeightSender,
    *,
    as_saved: Callable[[Weights], Weights] | None,
) -> None:
    """Send all weights where no image is made. `as_saved`: what the image holds; None: the same."""
    gathered: Weights = {}
    for part in parts:
        if as_saved is None:
            sender.add(part)
        else:
            gathered |= {name: to_cpu(weight, weight.dtype) for name, weight in part.items()}
    if as_saved is not None:
        sender.add(as_saved(gathered))
    sender.end()


def adapter_images(weights: Mapping[str, Tensor], shape: AdapterShape) -> WeightImages:
    """Of every A and B, which must still be whole."""
    room = {name: torch.empty_like(weight, device="cpu") for name, weight in weights.items()}
    return WeightImages(room, as_saved=lambda weights: weights, adapters=shape)


class WeightImages:
    """Makes bundles of weights; the header is made once, as shapes do not change.

    Fresh memory costs three times the copy into it, so an image whose bundle nobody holds any more
    is written over: two take turns where the readers share this process, one is enough elsewhere.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        as_saved: Callable[[Weights], Weights],
        adapters: AdapterShape | None = None,
    ) -> None:
        """`weights` is room for all of them; `as_saved` gives them the names of the image."""
        self._as_saved = as_saved
        self._adapters = adapters
        saved = as_saved(weights)
        self._header, self._num_bytes = image_header(saved)
        # Where transformers saves other tensors than the model has, these are gathered first.
        self._gathered = None if _are_same(saved, weights) else weights
        self._images: list[_Image] = []

    def bundle(
        self,
        parts: Iterable[Mapping[str, Tensor]],
        *,
        version: int,
        sender: WeightSender | None = None,
    ) -> WeightBundle:
        """The image of all weights, which come in parts, each whole until the next is asked for.

        A `sender` is given every weight, too, under its name in the image.
        """
        image = next((image for image in self._images if image.is_free()), None)
        if image is None:
            image = _Image(self._header, self._num_bytes)
            self._images.append(image)
        for part in parts:
            copy_weights(part, image.weights if self._gathered is None else self._gathered)
            if sender is not None and self._gathered is None:
                sender.add(part)
        if self._gathered is not None:
            copy_weights(self._as_saved(self._gathered), image.weights)
            if sender is not None:
                sender.add(image.weights)
        if sender is not None:
            sender.end()  # the rest need not wait for the checksum
        payload = image.lent()
        return WeightBundle(
            version=version,
            payload=payload,
            checksum=xxhash.xxh3_64_intdigest(payload),
            adapters=self._adapters,
        )


def _are_same(saved: Weights, weights: Weights) -> bool:
    return saved.keys() == weights.keys() and all(
        saved[name] is weight for name, weight in weights.items()
    )


class _Image:
    """Memory that is lent for as long as somebody holds its payload."""

    def __init__(self, header: bytes, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8).numpy()  # aligned as torch likes
        self._bytes[: len(header)] = np.frombuffer(header, np.uint8)
        self.weights = tensors_in(self._bytes)
        self._holders: weakref.ref[_Lent] | None = None  # None: never lent

    def is_free(self) -> bool:
        return self._holders is None or self._holders() is None

    def lent(self) -> NDArray[np.uint8]:
        """The payload; read-only, as those who read it are many."""
        owner = _Lent(self._bytes)
        self._holders = weakref.ref(owner)
        payload = np.asarray(owner)
        payload.flags.writeable = False
        return payload


class _Lent:
    """What every view of a payload keeps alive, and with it the claim on the memory."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
