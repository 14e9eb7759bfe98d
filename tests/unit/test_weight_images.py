"""The image of a sync: as safetensors reads it, written in place, its memory used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from grpo.weight_image import image_header, tensors_in
from learner.weight_images import model_images
from learner.weights import named_weights
from tests.unit.rollout_models import make_model, policy


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), tied=request.param)


def parts(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Some at a time, as ZeRO-3 gathers them."""
    weights = list(named_weights(model).items())
    return [dict(weights[:3]), dict(weights[3:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_reads_the_weights_in_the_dtype_of_the_rollouts(
    model: str, dtype: torch.dtype
) -> None:
    policy_ = policy(model, seed=1)
    bundle = model_images(policy_, dtype).bundle(parts(policy_), version=1)
    found = load(bundle.payload.tobytes())
    expected = named_weights(policy_)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in found)


def test_mixed_types_and_empty_tensors_lie_where_the_header_says() -> None:
    weights = {
        "flag": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "count": torch.tensor(7),
        "odd": torch.arange(5, dtype=torch.bfloat16),
        "matrix": torch.randn(3, 5),
    }
    header, num_bytes = image_header(weights)
    image = np.zeros(num_bytes, np.uint8)
    image[: len(header)] = np.frombuffer(header, np.uint8)
    for name, tensor in tensors_in(image).items():
        tensor.copy_(weights[name])
    for found in (load(image.tobytes()), tensors_in(image)):
        assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
            name: (t.dtype, t.tolist()) for name, t in weights.items()
        }


def test_a_version_that_somebody_holds_is_not_written_over(model: str) -> None:
    images = model_images(policy(model, seed=0), torch.float32)
    old = images.bundle(parts(policy(model, seed=0)), version=0)
    held = tensors_in(old.payload)["model.norm.weight"]  # a tensor alone holds its image, too
    place, before = old.payload.ctypes.data, held.clone()
    del old
    new = images.bundle(parts(policy(model, seed=1)), version=1)
    assert new.payload.ctypes.data != place
    assert torch.equal(held, before)
    del held
    newer = images.bundle(parts(policy(model, seed=2)), version=2)
    assert newer.payload.ctypes.data == place
    assert not newer.payload.flags.writeable
