"""Adapters beside a base in 4 bits: the policy is the rounded base with them, wherever it goes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.types import TrainRow
from learner.config import LearnerConfig, LoraConfig
from learner.packing import blocks
from learner.reference import WithoutAdapters
from orchestration.check import checked
from orchestration.recipe import Recipe
from tests.unit.learner_cases import (
    batch_of,
    merged_weights,
    published,
    random_rows,
    rank_of,
    save,
    torch_config,
    trained,
    write_model,
)
from tests.unit.learner_objectives import WHOLE_GROUPS
from tests.unit.small_project import settings

LORA = {"rank": 4, "alpha": 8, "quantization": "nf4"}
TEMPERATURE = 0.8  # of rank_of


def qlora_config(**changed: object) -> LearnerConfig:
    return torch_config(**({"lora": LORA} | changed))


def rounded(model: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The files of a model with every linear layer but the output layer rounded to 4 bits."""
    weights = load_file(Path(model) / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            held, state = quantize_4bit(
                weight.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            weights[name] = dequantize_4bit(held, state)
    return weights


def plain_log_probs(
    model: str, weights: dict[str, torch.Tensor], rows: list[TrainRow]
) -> list[list[float]]:
    """Those of transformers, a row at a time."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    found = []
    for row in rows:
        tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = plain(tokens[None]).logits[0, len(row.context) - 1 : -1] / TEMPERATURE
        chosen = tokens[len(row.context) :, None]
        found.append(logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist())
    return found


def held_bytes(model: PreTrainedModel) -> int:
    """Of the base's linear layers, scales included."""
    total = 0
    for name, weight in model.named_parameters():
        if not name.endswith(("_proj.weight", "_proj.base_layer.weight")):
            continue
        tensors = [weight.data]
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.mark.parametrize("tied", [True, False])
def test_the_policy_is_the_rounded_base_with_the_adapters_and_so_is_all_that_leaves(
    tmp_path: Path, tied: bool
) -> None:
    base = write_model(tmp_path / "base", tied=tied)
    learner = rank_of(base, qlora_config())
    rows = random_rows(6, seed=9)
    of_files = plain_log_probs(base, load_file(Path(base) / "model.safetensors"), rows)
    for step in range(3):
        folder = tmp_path / str(step)
        save(learner, folder)
        adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
        policy = merged_weights(rounded(base), adapters, scale=8 / 4)
        expected = plain_log_probs(base, policy, rows)
        for values, others, unrounded in zip(
            learner.log_probs(rows), expected, of_files, strict=True
        ):
            assert values == pytest.approx(others, abs=1e-4)
            assert values != pytest.approx(unrounded, abs=1e-2)
        exported, sent = load_file(folder / "huggingface" / "model.safetensors"), published(learner)
        assert exported.keys() == sent.keys() == policy.keys()
        for name, weight in policy.items():
            assert exported[name].equal(sent[name])
            torch.testing.assert_close(sent[name], weight, atol=1e-6, rtol=1e-6)
        assert any(weight.any() for name, weight in adapters.items() if "lora_B" in name) == bool(
            step
        )
        learner.train(batch_of(random_rows(8, seed=step), step=step))


def test_layers_without_adapters_are_rounded_too_and_published_so(tmp_path: Path) -> None:
    base = write_model(tmp_path)
    learner = trained(base, qlora_config(lora=LORA | {"target_modules": ["q_proj"]}))
    weights = published(learner)
    moved = {
        name.split(".")[-2]
        for name, weight in rounded(base).items()
        if not weights[name].equal(weight)
    }
    assert moved == {"q_proj"}


def test_bfloat16_publishes_the_sum_of_the_rounded_base_and_float32_adapters(
    tmp_path: Path,
) -> None:
    base = write_model(tmp_path / "base")
    learner = trained(base, qlora_config(dtype="bfloat16"))
    save(learner, tmp_path)
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    policy = merged_weights(rounded(base, torch.bfloat16), adapters, scale=8 / 4)
    for name, weight in published(learner).items():
        torch.testing.assert_close(weight, policy[name].bfloat16(), atol=1e-6, rtol=2**-7)


def test_the_reference_is_the_rounded_base_without_a_second_model(tmp_path: Path) -> None:
    base, rows = write_model(tmp_path), random_rows(8)
    learner = trained(base, qlora_config())
    reference = learner._trainee.reference
    assert isinstance(reference, WithoutAdapters)
    block = blocks(rows, max_tokens=10_000, rank=0, ranks=1)[0]
    initial = rank_of(base, qlora_config())._trainee.backend.forward(block)[0]
    torch.testing.assert_close(reference.log_probs(block), initial, atol=0, rtol=0)
    assert (learner._trainee.backend.forward(block)[0] - initial).abs().max() > 0.1


def test_a_reference_that_moves_begins_at_the_rounded_base(tmp_path: Path) -> None:
    base = write_model(tmp_path)
    learner = rank_of(base, qlora_config(), objective=WHOLE_GROUPS)
    assert learner._moving_reference is not None
    averages = dict(learner._moving_reference.averages())
    assert all(averages[name].equal(weight) for name, weight in rounded(base).items())
    learner.train(batch_of(random_rows(8)))
    averages = dict(learner._moving_reference.averages())
    before, after = rounded(base), published(learner)
    for name, weight in after.items():
        average = 0.5 * before[name] + 0.5 * weight  # decay 0.5
        torch.testing.assert_close(averages[name], average, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_is_saved_and_continued_is_the_uninterrupted_one(
    tmp_path: Path, checkpointing: bool
) -> None:
    base = write_model(tmp_path / "base")
    config = qlora_config(gradient_checkpointing=checkpointing)
    learner = trained(base, config)
    save(learner, tmp_path)
    resumed = rank_of(base, config)
    resumed.load(str(tmp_path))
    batch = batch_of(random_rows(8, seed=5), step=2)
    assert dict(resumed.train(batch).metrics) == dict(learner.train(batch).metrics)
    weights = published(resumed)
    assert all(weight.equal(weights[name]) for name, weight in published(learner).items())


def test_the_linear_layers_of_the_base_take_an_eighth_of_their_bytes(tmp_path: Path) -> None:
    base = write_model(tmp_path, hidden_size=256)
    whole = held_bytes(rank_of(base, torch_config(lora={"rank": 4}))._pretrained)
    held = held_bytes(rank_of(base, qlora_config())._pretrained)
    # 0.5 bytes a weight and 1 / 64 for its share of an absmax in place of 4, and 1 KiB a layer.
    assert 0.129 < held / whole < 0.14


def test_adapters_by_themselves_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValidationError, match=r"quantization is nf4 .*set publish: merged"):
        LoraConfig(quantization="nf4", publish="adapter")


def test_check_says_what_to_install_where_bitsandbytes_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = {"backend": "torch", "lora": {"quantization": "nf4"}}
    recipe = Recipe.model_validate(settings(learner=learner))
    found = {finding.name: finding for finding in checked(recipe, local=True)}
    assert found["versions"].ok
    assert found["adapters"].detail.endswith("merged into all weights, base held in nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    finding = next(iter(checked(recipe, local=True)))
    assert not finding.ok
    assert finding.detail == (
        "bitsandbytes is not installed, but needed for learner.lora.quantization: nf4 "
        "(pip install bitsandbytes, or leave quantization out)"
    )
