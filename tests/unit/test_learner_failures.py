"""What the learner says when a step cannot be done: whose number it was, which budget to lower."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.errors import NonFinite, OutOfMemory
from grpo.objective import Objective, Surrogate
from grpo.types import TrainRow
from learner.failures import memory_remedy, room_for
from learner.packing import pack
from learner.rank import LearnerRank
from tests.unit.learner_cases import (
    batch_of,
    overflowing_row,
    random_rows,
    rank_of,
    torch_config,
    write_model,
)

NO_SUCH_MEMORY = 2**60  # bytes: more than any address space, so that it fails at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def row_of(context: int, completion: int) -> TrainRow:
    long = random_rows(1)[0]
    size = {
        name: np.resize(getattr(long, name), completion)
        for name in (
            "tokens",
            "weights",
            "advantages",
            "policy_weights",
            "behaviour_log_probs",
            "versions",
            "origins",
        )
    }
    return replace(long, context=np.resize(long.context, context), **size)


def test_a_gradient_that_overflows_names_the_token_with_the_steepest_loss(model: str) -> None:
    steep = replace(overflowing_row(), group=7, index=2)
    num_tokens = len(steep.tokens)
    steep = replace(steep, weights=np.eye(num_tokens, dtype=np.float32)[num_tokens - 1])
    with pytest.raises(NonFinite) as raised:
        rank_of(model, torch_config()).train(batch_of([*random_rows(4), steep], step=3))
    assert raised.value.place == (7, 2, num_tokens - 1)
    said = f"steepest in the log-probability of completion token {num_tokens - 1} of rollout 2"
    assert said in str(raised.value)


def test_the_place_survives_the_way_between_processes(model: str) -> None:
    row = replace(
        row_of(2, 1),
        group=3,
        index=1,
        advantages=np.array([np.nan], np.float32),
        weights=np.ones(1, np.float32),
    )
    with pytest.raises(NonFinite) as raised:
        rank_of(model, torch_config()).train(batch_of([row]))
    assert pickle.loads(pickle.dumps(raised.value)).place == (3, 1, 0)


def test_a_ratio_that_overflows_names_its_token(model: str) -> None:
    """Every stream is finite, but exp(log-prob - (-200)) is not."""
    row = row_of(3, 4)
    behaviour = np.full(4, -2.0, np.float32)
    behaviour[2] = -200.0
    row = replace(
        row,
        group=5,
        index=1,
        behaviour_log_probs=behaviour,
        origins=np.zeros(4, np.uint8),
        weights=np.ones(4, np.float32),
    )
    uncapped = Objective(
        log_ratio=lambda inputs: inputs.log_probs - inputs.behaviour_log_probs,
        surrogate=lambda log_ratio, inputs: Surrogate(
            loss=log_ratio.exp(),
            clipped_low=torch.zeros_like(log_ratio, dtype=torch.bool),
            clipped_high=torch.zeros_like(log_ratio, dtype=torch.bool),
        ),
    )
    with pytest.raises(NonFinite, match="ratio to the policy that sampled is inf") as raised:
        rank_of(model, torch_config(), objective=uncapped).train(batch_of([row]))
    assert raised.value.place == (5, 1, 2)


@pytest.fixture
def limited(model: str) -> Iterator[LearnerRank]:
    """A learner whose decoder asks the allocator for the impossible above 40 tokens."""
    learner = rank_of(model, torch_config(max_tokens_per_microbatch=64))

    def refuse(module: torch.nn.Module, arguments: object, named: dict[str, torch.Tensor]) -> None:
        if named["input_ids"].numel() > 40:
            torch.empty(NO_SUCH_MEMORY, dtype=torch.uint8)

    decoder = learner._pretrained.get_decoder()
    handle = decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    yield learner
    handle.remove()


def test_out_of_memory_names_the_budget_and_its_new_value(limited: LearnerRank) -> None:
    rows = [row_of(4, 12) for _ in range(4)]
    with pytest.raises(OutOfMemory) as raised:
        limited.train(batch_of(rows))
    said = str(raised.value)
    assert "in the forward and backward pass of a micro-batch of 64 tokens (4 rollouts)" in said
    assert "lower learner.max_tokens_per_microbatch: 64 -> 32" in said
    assert "DefaultCPUAllocator" in said


def test_the_advice_is_one_that_helps(limited: LearnerRank, model: str) -> None:
    smaller = rank_of(model, torch_config(max_tokens_per_microbatch=32))
    rows = [row_of(4, 12) for _ in range(4)]
    assert max(block.input_ids.numel() for block in smaller._trainee.blocks(rows)) <= 40


def test_every_pass_of_the_policy_explains_itself(limited: LearnerRank) -> None:
    rows = [row_of(4, 12) for _ in range(4)]
    with pytest.raises(OutOfMemory, match="pass without gradient"):
        limited.train(batch_of(rows, rows))
    with pytest.raises(OutOfMemory, match="pass without gradient"):
        limited.log_probs(rows)


def test_a_rollout_that_does_not_fit_alone_gets_other_advice(limited: LearnerRank) -> None:
    with pytest.raises(OutOfMemory) as raised:
        limited.train(batch_of([row_of(4, 60)]))
    assert "max_tokens_per_microbatch" not in str(raised.value)
    assert "set learner.gradient_checkpointing: true or lower sampling" in str(raised.value)
    already = memory_remedy(pack([row_of(4, 60)]), max_tokens=64, is_checkpointing=True)
    assert "gradient_checkpointing" not in already
    assert "its completion has 60 tokens, its context 4" in already


def test_the_budget_is_never_lowered_below_the_longest_rollout() -> None:
    block = pack([row_of(4, 60), row_of(4, 8), row_of(4, 8)])
    said = memory_remedy(block, max_tokens=100, is_checkpointing=False)
    assert said.endswith("100 -> 64")


def test_a_device_s_error_is_known_and_any_other_one_is_left_alone() -> None:
    block = pack([row_of(4, 8), row_of(4, 8)])
    with (
        pytest.raises(OutOfMemory, match="CUDA out of memory"),
        room_for(block, "pass", max_tokens=32, is_checkpointing=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        pytest.raises(RuntimeError, match="shapes"),
        room_for(block, "pass", max_tokens=32, is_checkpointing=False),
    ):
        raise RuntimeError("shapes do not match")


def test_the_divergence_of_engine_and_learner_is_measured(model: str, tmp_path: Path) -> None:
    """Engine 0.5 above the learner on one of 4 tokens: k3 is exp(-0.5) - 1 + 0.5 = 0.10653."""
    learner = rank_of(model, torch_config())
    row = replace(row_of(3, 4), origins=np.zeros(4, np.uint8), versions=np.zeros(4, np.int32))
    log_probs = np.asarray(learner.log_probs([row])[0], np.float32)
    log_probs[1] += 0.5
    metrics = learner.train(batch_of([replace(row, behaviour_log_probs=log_probs)])).metrics
    assert metrics["log_prob_gap/kl"] == pytest.approx(0.10653 / 4, rel=1e-3)
