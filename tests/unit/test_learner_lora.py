"""Low-rank adapters on the torch backend: they alone move, and what leaves is the merged model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load, load_file
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import UserError
from grpo.types import AdapterShape, TrainRow
from learner.config import LearnerConfig, LoraConfig
from learner.packing import blocks
from learner.reference import WithoutAdapters
from orchestration.check import Finding, checked
from orchestration.recipe import Recipe
from rollout_workers.adapter_limits import vllm_rank
from tests.unit.learner_cases import (
    EVERYTHING,
    GRPO,
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
from tests.unit.small_project import MODEL, settings

LORA = {"rank": 4, "alpha": 8}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def lora_config(**settings: object) -> LearnerConfig:
    return torch_config(**({"lora": LORA} | settings))


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_model_is_the_policy_under_the_names_of_the_base(
    tmp_path: Path, tied: bool
) -> None:
    base = write_model(tmp_path / "base", tied=tied)
    learner = trained(base, lora_config())
    save(learner, tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    exported = load_file(tmp_path / "huggingface" / "model.safetensors")
    assert exported.keys() == before.keys()
    moved = {name.split(".")[-2] for name in before if not exported[name].equal(before[name])}
    assert moved == LINEAR
    assert all(weight.equal(exported[name]) for name, weight in published(learner).items())
    merged = rank_of(str(tmp_path / "huggingface"), torch_config())
    rows = random_rows(6, seed=9)
    initial = rank_of(base, torch_config()).log_probs(rows)
    values = zip(learner.log_probs(rows), merged.log_probs(rows), initial, strict=True)
    for unmerged, of_export, of_base in values:
        assert unmerged == pytest.approx(of_export, abs=1e-4)
        assert unmerged != pytest.approx(of_base, abs=1e-2)


def test_what_is_published_as_adapters_is_what_makes_the_base_the_merged_model(
    model: str, tmp_path: Path
) -> None:
    merged = published(trained(model, lora_config()))
    learner = trained(model, lora_config(lora={**LORA, "publish": "adapter"}))
    bundle = learner.publish(3)
    assert bundle is not None
    assert bundle.adapters == AdapterShape(rank=4, alpha=8, target_modules="all-linear")
    weights = load(bundle.payload.tobytes())
    base = load_file(Path(model) / "model.safetensors")
    adapted = merged_weights(base, weights, scale=8 / 4)
    assert adapted.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(adapted[name], weight, atol=1e-6, rtol=1e-6)
    save(learner, tmp_path)
    in_checkpoint = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert in_checkpoint.keys() == weights.keys()
    assert all(weight.equal(weights[name]) for name, weight in in_checkpoint.items())
    learner.train(batch_of(random_rows(8, seed=5), step=2))
    assert all(weight.equal(weights[name]) for name, weight in in_checkpoint.items())  # a copy
    later = published(learner)
    assert not any(later[name].equal(weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("rollout", "lora", "problem"),
    [
        ({"engine": "vllm"}, {"rank": 600}, r"rank is 600, but vLLM .* 512 at most: lower it, or"),
        (
            {"engine": "vllm", "gpus_per_worker": 1},
            {},
            r"dtype: bfloat16, or set .*publish: merged",
        ),
    ],
)
def test_adapters_that_vllm_cannot_apply_are_refused_with_the_remedy(
    rollout: dict[str, object], lora: dict[str, object], problem: str
) -> None:
    learner = {"backend": "torch", "lora": {**lora, "publish": "adapter"}}
    with pytest.raises(ValidationError, match=problem):
        Recipe.model_validate(settings(rollout=rollout, learner=learner))
    learner = {"backend": "torch", "lora": lora}
    assert Recipe.model_validate(settings(rollout=rollout, learner=learner))


def test_vllm_makes_room_for_the_next_rank_that_it_has() -> None:
    assert [vllm_rank(rank) for rank in (1, 2, 8, 12, 257, 512)] == [1, 8, 8, 16, 320, 512]


def test_check_says_which_layers_get_adapters_and_refuses_names_and_ranks_that_are_none() -> None:
    def finding(**lora: object) -> Finding:
        recipe = Recipe.model_validate(settings(learner={"backend": "torch", "lora": lora}))
        return next(found for found in checked(recipe, local=True) if found.name == "adapters")

    layers = AutoConfig.from_pretrained(MODEL).num_hidden_layers
    found = finding(rank=4, target_modules=["q_proj", "up_proj"], publish="adapter")
    assert found.detail == f"rank 4 beside {2 * layers} layers, published by themselves"
    assert (
        finding().detail == f"rank 16 beside {7 * layers} layers, published merged into all weights"
    )
    refused = finding(target_modules=["c_attn"])
    assert not refused.ok and "names 'c_attn', which is no linear layer" in refused.detail
    width = AutoConfig.from_pretrained(MODEL).hidden_size
    assert finding(rank=width).ok
    refused = finding(rank=width + 1)
    assert not refused.ok and f"have rank {width} at most" in refused.detail


def test_only_adapters_move_and_have_state(model: str, tmp_path: Path) -> None:
    learner = trained(model, lora_config(weight_decay=0.1))
    held = dict(learner._pretrained.named_parameters())
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        inside = name if name in held else name.replace("_proj.", "_proj.base_layer.")
        assert held[inside].equal(weight)
    save(learner, tmp_path)
    with safe_open(tmp_path / "learner" / "rank_0.safetensors", "pt") as saved:
        assert all(".lora_" in key for key in saved.keys())  # noqa: SIM118  # not a dict
        sizes = {key: saved.get_slice(key).get_shape() for key in saved.keys()}  # noqa: SIM118
    # 4 * (in + out) over q 32+32, k 32+16, v 32+16, o 32+32, gate 32+48, up 32+48, down 48+32
    masters = [shape for key, shape in sizes.items() if key.startswith("master:")]
    assert sum(int(np.prod(shape)) for shape in masters) == 2 * 4 * 464


def test_chosen_layers_alone_get_adapters(model: str) -> None:
    learner = trained(model, lora_config(lora={"target_modules": ["q_proj", "mlp.up_proj"]}))
    before = load_file(Path(model) / "model.safetensors")
    weights = published(learner)
    moved = {name.split(".")[-2] for name in before if not weights[name].equal(before[name])}
    assert moved == {"q_proj", "up_proj"}


def test_the_reference_is_the_initial_policy_without_a_second_model(model: str) -> None:
    rows = random_rows(8)
    learner = trained(model, lora_config())
    reference = learner._trainee.reference
    assert isinstance(reference, WithoutAdapters)
    block = blocks(rows, max_tokens=10_000, rank=0, ranks=1)[0]
    initial = rank_of(model, torch_config())._trainee.backend.forward(block)[0]
    torch.testing.assert_close(reference.log_probs(block), initial, atol=0, rtol=0)
    assert (learner._trainee.backend.forward(block)[0] - initial).abs().max() > 0.1
    # Switched on again, and trainable as before.
    assert learner.train(batch_of(rows, step=2)).metrics["grad_norm"] > 0


def test_a_reference_that_moves_follows_the_merged_weights(model: str) -> None:
    rows = random_rows(8)
    learner = rank_of(model, lora_config(), objective=WHOLE_GROUPS)
    before = published(learner)
    learner.train(batch_of(rows))
    reference = learner._moving_reference
    assert reference is not None
    averages = dict(reference.averages())
    for name, weight in published(learner).items():
        average = 0.5 * before[name] + 0.5 * weight  # decay 0.5
        torch.testing.assert_close(averages[name], average, atol=1e-6, rtol=1e-5)


def on_policy(rows: list[TrainRow]) -> list[TrainRow]:
    """Rows whose loss at a ratio of 1 is -weight * advantage a token."""
    return [replace(row, policy_weights=np.ones_like(row.policy_weights)) for row in rows]


def test_two_steps_are_those_of_a_plain_loop_over_peft(model: str) -> None:
    config = lora_config(adam_epsilon=1e-3, max_grad_norm=0.0)
    plain = GRPO | {"importance_cap": None}
    learner = rank_of(model, config, algorithm=plain)
    steps = [on_policy(random_rows(6, seed=step)) for step in range(2)]
    for step, rows in enumerate(steps):
        learner.train(batch_of(rows, step=step))
    torch.manual_seed(0)  # the learner's
    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapters = [weight for weight in wrapped.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, eps=1e-3, weight_decay=0.0)
    for rows in steps:
        optimizer.zero_grad()
        for row in rows:
            tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
            logits = wrapped(tokens[None]).logits[0, len(row.context) - 1 : -1] / 0.8
            chosen = tokens[len(row.context) :, None]
            log_probs = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
            (torch.from_numpy(-row.weights * row.advantages) * log_probs).sum().backward()
        optimizer.step()
    expected = wrapped.merge_and_unload().state_dict()
    start = load_file(Path(model) / "model.safetensors")
    for name, weight in published(learner).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (expected[name] - start[name]).abs().max() > 1e-3


def test_recomputed_activations_change_nothing_though_the_base_is_frozen(model: str) -> None:
    kept = published(trained(model, lora_config()))
    recomputed = published(trained(model, lora_config(gradient_checkpointing=True)))
    assert all(weight.equal(recomputed[name]) for name, weight in kept.items())


def test_adapters_of_a_bfloat16_model_are_float32_and_resume_exactly(
    model: str, tmp_path: Path
) -> None:
    config = lora_config(dtype="bfloat16")
    learner = trained(model, config)
    save(learner, tmp_path)
    resumed = rank_of(model, config)
    resumed.load(str(tmp_path))
    for one in (learner, resumed):
        one.train(batch_of(random_rows(8, seed=5), step=2))
    adapters, others = learner._trainee.backend, resumed._trainee.backend
    for name, piece in adapters.copied_state().items():
        assert piece.dtype == torch.float32
        assert piece.equal(others.copied_state()[name])
    assert published(resumed).keys() == published(learner).keys()
    assert {weight.dtype for weight in published(learner).values()} == {torch.bfloat16}


def test_a_name_that_is_no_linear_layer_is_refused_with_those_that_are(model: str) -> None:
    config = lora_config(lora={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match=r"names .lm_head., which is no linear layer.*q_proj"):
        rank_of(model, config, algorithm=EVERYTHING)


def test_dropout_and_an_empty_choice_are_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match=r"found 0\.05; expected 0: .*Leave dropout out"):
        LoraConfig(dropout=0.05)
    with pytest.raises(ValidationError, match="expected all-linear"):
        LoraConfig(target_modules=())


def test_an_empty_section_switches_adapters_on() -> None:
    recipe = Recipe.model_validate(settings(learner={"lora": {}}))
    assert recipe.learner.lora == LoraConfig(rank=16, alpha=32, target_modules="all-linear")
