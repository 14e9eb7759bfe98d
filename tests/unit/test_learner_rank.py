"""A learner rank on the torch backend: what a step does, what it reports, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import NonFinite
from grpo.objective import LossInputs, Objective, Surrogate
from grpo.types import TrainRow, WeightBundle
from learner.rank import LearnerRank
from tests.unit.learner_cases import (
    EVERYTHING,
    batch_of,
    overflowing_row,
    random_rows,
    rank_of,
    save,
    torch_config,
    write_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def published(learner: LearnerRank, version: int = 0) -> WeightBundle:
    bundle = learner.publish(version)
    assert bundle is not None
    return bundle


def with_true_log_probs(learner: LearnerRank, rows: list[TrainRow]) -> list[TrainRow]:
    """The rows as if the learner's own policy had sampled them."""
    values = learner.log_probs(rows)
    return [
        replace(row, behaviour_log_probs=np.asarray(log_probs, np.float32))
        for row, log_probs in zip(rows, values, strict=True)
    ]


def test_training_lowers_the_loss_of_the_same_rows(model: str) -> None:
    learner = rank_of(model, torch_config(learning_rate=1e-3))
    rows = with_true_log_probs(learner, random_rows(8))
    losses = [learner.train(batch_of(rows, step=step)).metrics["loss"] for step in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_several_updates_share_the_policy_at_the_start_of_the_step(model: str) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remembered(inputs: LossInputs) -> torch.Tensor:
        seen.append((inputs.proximal_log_probs.clone(), inputs.log_probs.detach().clone()))
        return inputs.log_probs - inputs.proximal_log_probs

    def plain(log_ratio: torch.Tensor, inputs: LossInputs) -> Surrogate:
        never = torch.zeros_like(log_ratio, dtype=torch.bool)
        loss = -log_ratio.exp() * inputs.advantages
        return Surrogate(loss=loss, clipped_low=never, clipped_high=never)

    learner = LearnerRank(
        model=model,
        config=torch_config(),
        algorithm=EVERYTHING,
        total_steps=1,
        temperature=0.8,
        rank=0,
        world_size=1,
        master="127.0.0.1:29500",
        seed=0,
        objective=Objective(log_ratio=remembered, surrogate=plain),
    )
    learner.start()
    rows = random_rows(4)
    start = [value for log_probs in learner.log_probs(rows) for value in log_probs]
    learner.train(batch_of(rows, rows))
    (first, now), (second, later) = seen
    torch.testing.assert_close(first, now)
    torch.testing.assert_close(second, first)
    assert sorted(first.tolist()) == pytest.approx(sorted(start), abs=1e-5)
    assert (later - first).abs().max() > 1e-3  # the first update has moved the policy


@pytest.mark.parametrize(
    ("stream", "value", "said"),
    [
        ("advantages", np.nan, "advantage is nan at completion token 1 of rollout 2 of group 0"),
        (
            "behaviour_log_probs",
            np.nan,
            "log-probability of the rollout engine is nan.*lower learner.learning_rate",
        ),
        ("weights", np.inf, "weight is inf"),
    ],
)
def test_a_loss_that_is_no_number_leaves_the_weights_untouched(
    model: str, stream: str, value: float, said: str
) -> None:
    learner = rank_of(model, torch_config())
    rows = random_rows(4)
    spoilt = np.array(getattr(rows[2], stream))
    spoilt[1] = value
    rows[2] = replace(
        rows[2],
        **{stream: spoilt},
        origins=np.zeros_like(rows[2].origins),
        policy_weights=np.ones_like(rows[2].policy_weights),
    )
    before = published(learner).checksum
    with pytest.raises(NonFinite, match=said):
        learner.train(batch_of(rows, step=7))
    assert published(learner).checksum == before


def test_a_gradient_that_overflows_leaves_the_weights_untouched(model: str) -> None:
    learner = rank_of(model, torch_config())
    before = published(learner).checksum
    with pytest.raises(NonFinite, match=r"step 3, update 1 of 1: .*gradient norm is"):
        learner.train(batch_of([overflowing_row()], step=3))
    assert published(learner).checksum == before


def test_agreement_is_measured_on_tokens_of_these_very_weights(model: str) -> None:
    learner = rank_of(model, torch_config())
    fresh, stale = with_true_log_probs(learner, random_rows(2, version=5))
    fresh = replace(
        fresh, origins=np.zeros_like(fresh.origins), versions=np.full_like(fresh.versions, 5)
    )
    log_probs = fresh.behaviour_log_probs.copy()
    log_probs[0] += 0.5
    fresh = replace(fresh, behaviour_log_probs=log_probs)
    stale = replace(
        stale,
        versions=np.full_like(stale.versions, 4),
        behaviour_log_probs=np.full(len(stale.tokens), -9.0, np.float32),
    )
    metrics = learner.train(batch_of([fresh, stale], version=5)).metrics
    assert metrics["log_prob_gap/num_tokens"] == len(fresh.tokens)
    assert metrics["log_prob_gap/max"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["log_prob_gap/mean"] == pytest.approx(0.5 / len(fresh.tokens), abs=1e-4)


def test_guidance_has_an_importance_of_one(model: str) -> None:
    learner = rank_of(model, torch_config())
    rows = with_true_log_probs(learner, random_rows(4))
    # Whatever stands in the stream on guidance tokens, nobody sampled them.
    rows = [
        replace(row, behaviour_log_probs=np.where(row.origins == 1, 0, row.behaviour_log_probs))
        for row in rows
    ]
    metrics = learner.train(batch_of(rows)).metrics
    assert metrics["importance/mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["log_prob_gap/max"] < 1e-4


def test_reference_stays_the_initial_policy(model: str) -> None:
    learner = rank_of(model, torch_config())
    rows = with_true_log_probs(learner, random_rows(6))
    kl = [learner.train(batch_of(rows, step=step)).metrics["kl"] for step in range(2)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4


def test_metrics_do_not_depend_on_micro_batches(model: str) -> None:
    rows = random_rows(12)
    one = rank_of(model, torch_config()).train(batch_of(rows[:6], rows[6:])).metrics
    many = rank_of(model, torch_config(max_tokens_per_microbatch=30)).train(
        batch_of(rows[:6], rows[6:])
    )
    assert dict(many.metrics) == pytest.approx(dict(one), abs=1e-5)


def test_resumed_training_equals_uninterrupted_training(model: str, tmp_path: Path) -> None:
    config = torch_config(lr_scheduler_type="linear", dtype="bfloat16")
    rows = random_rows(8)
    learner = rank_of(model, config)
    learner.train(batch_of(rows))
    save(learner, tmp_path)
    learner.train(batch_of(rows, step=1))
    resumed = rank_of(model, config)
    resumed.load(str(tmp_path))
    report = resumed.train(batch_of(rows, step=1))
    assert report.metrics["learning_rate"] == pytest.approx(0.009)
    assert published(resumed).checksum == published(learner).checksum


def test_bfloat16_weights_gather_updates_too_small_for_them(model: str) -> None:
    config = torch_config(dtype="bfloat16", learning_rate=2e-4)
    learner = rank_of(model, config)
    rows = random_rows(8)
    start = load(published(learner).payload.tobytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = []
    for step in range(8):
        learner.train(batch_of(rows, step=step))
        weight = load(published(learner).payload.tobytes())[name]
        moved.append((weight != start[name]).float().mean().item())
    assert moved[7] > moved[0]
    assert moved[7] > 0.2


@pytest.mark.parametrize("tied", [True, False])
def test_published_weights_load_into_transformers(tmp_path: Path, tied: bool) -> None:
    model = write_model(tmp_path / "model", tied=tied)
    learner = rank_of(model, torch_config())
    rows = random_rows(4)
    learner.train(batch_of(rows))
    bundle = published(learner, version=3)
    image = bundle.payload.tobytes()
    assert bundle.version == 3
    assert bundle.checksum == xxhash.xxh3_64_intdigest(image)
    weights = load(image)
    original = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == original.keys()
    assert ("lm_head.weight" in weights) is not tied
    save(learner, tmp_path / "step")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "step" / "huggingface")
    state = exported.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    tokens = torch.from_numpy(np.concatenate([rows[0].context, rows[0].tokens]).astype(np.int64))
    logits = exported(tokens[None]).logits[0, len(rows[0].context) - 1 : -1] / 0.8
    chosen = tokens[len(rows[0].context) :, None]
    expected = logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
    assert learner.log_probs(rows)[0] == pytest.approx(expected, abs=1e-4)


def test_export_holds_the_tokenizer_of_the_source(model: str, tmp_path: Path) -> None:
    save(rank_of(model, torch_config(dtype="bfloat16")), tmp_path)
    folder = tmp_path / "huggingface"
    assert AutoTokenizer.from_pretrained(folder)("ha")["input_ids"] == [9, 2]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_publish_dtype_is_independent_of_the_training_dtype(model: str) -> None:
    learner = rank_of(model, torch_config(publish_dtype="bfloat16"))
    weights = load(published(learner).payload.tobytes())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_training_at_temperature_zero_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        LearnerRank(
            model=model,
            config=torch_config(),
            algorithm=EVERYTHING,
            total_steps=1,
            temperature=0.0,
            rank=0,
            world_size=1,
            master="127.0.0.1:29500",
            seed=0,
        )
