"""Packing, micro-batches and log-probabilities: a row's numbers do not depend on its company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config

from grpo.errors import UserError
from grpo.objective import loss_and_metrics
from grpo.types import Origin, TrainRow
from learner.packing import blocks, pack, shares, weightless
from learner.policy import load_policy, policy_inputs
from learner.rank import algorithm_objective
from learner.reference import Reference
from learner.row_cost import BY_TOKENS, RowCost
from learner.torch_backend import TorchBackend
from learner.update import Trainee, loss_inputs, reference_log_probs
from tests.unit.learner_cases import EVERYTHING, random_rows, torch_config, write_model

TEMPERATURE = 0.8
CPU = torch.device("cpu")
# A model of half a billion parameters: attention costs as much as the rest at 22,970 tokens.
LONG_CONTEXT = RowCost(per_token=493_961_216, per_pair=21_504)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("reference"), seed=1)


def trainee_of(
    model: str,
    other_model: str,
    max_tokens: int,
    *,
    row_cost: RowCost = BY_TOKENS,
    **settings: object,
) -> Trainee:
    config = torch_config(max_tokens_per_microbatch=max_tokens, **settings)
    return Trainee(
        backend=TorchBackend(load_policy(model, config, temperature=TEMPERATURE), config),
        objective=algorithm_objective(EVERYTHING),
        reference=Reference(
            load_policy(other_model, config, temperature=TEMPERATURE),
            device=CPU,
            is_moving=False,
            is_offloaded=False,
        ),
        config=config,
        row_cost=row_cost,
        rank=0,
        ranks=1,
    )


def loss_and_gradient(trainee: Trainee, rows: list[TrainRow]) -> tuple[float, torch.Tensor]:
    micro_batches = trainee.blocks(rows)
    total = 0.0
    for place, block in enumerate(micro_batches):
        inputs = loss_inputs(trainee, block, None, reference_log_probs(trainee, block, block.rows))
        loss, _ = loss_and_metrics(trainee.objective, inputs)
        trainee.backend.backward(loss, is_last=place == len(micro_batches) - 1)
        total += loss.item()
    assert isinstance(trainee.backend, TorchBackend)
    gradients = [weight.grad for weight in trainee.backend._policy.parameters()]
    return total, torch.cat([grad.flatten() for grad in gradients if grad is not None])


def log_probs_alone(model: str, row: TrainRow) -> torch.Tensor:
    """[T] through transformers' own forward pass of this row alone."""
    tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits = loaded(tokens[None]).logits[0, len(row.context) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, tokens[len(row.context) :, None])[:, 0]


def test_a_packed_row_has_the_log_probabilities_of_the_row_alone(model: str) -> None:
    rows = random_rows(9)
    policy = load_policy(model, torch_config(), temperature=TEMPERATURE)
    block = pack(rows)
    assert len(block.input_ids) < len(rows)  # some line holds several rows
    packed = policy(**policy_inputs(block, CPU))[0]
    for place, row in enumerate(block.rows):
        torch.testing.assert_close(
            packed[block.row == place], log_probs_alone(model, row), atol=1e-5, rtol=1e-5
        )


def test_entropy_is_that_of_the_tempered_distribution(model: str) -> None:
    row = random_rows(1)[0]
    policy = load_policy(model, torch_config(), temperature=TEMPERATURE)
    entropy = policy(**policy_inputs(pack([row]), CPU), with_entropy=True)[1]
    tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
    logits = AutoModelForCausalLM.from_pretrained(model)(tokens[None]).logits[0]
    expected = torch.distributions.Categorical(logits=logits.double() / TEMPERATURE).entropy()
    torch.testing.assert_close(
        entropy.double(), expected[len(row.context) - 1 : -1], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_micro_batch_size_changes_neither_loss_nor_gradient(
    model: str, other_model: str, max_tokens: int
) -> None:
    rows = random_rows(13)
    loss, gradient = loss_and_gradient(trainee_of(model, other_model, 80), rows)
    other_loss, other_gradient = loss_and_gradient(trainee_of(model, other_model, max_tokens), rows)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_loss_and_gradient_add_up_over_rows_computed_one_by_one(
    model: str, other_model: str
) -> None:
    rows = random_rows(7)
    loss, gradient = loss_and_gradient(trainee_of(model, other_model, 10_000), rows)
    alone = [loss_and_gradient(trainee_of(model, other_model, 10_000), [row]) for row in rows]
    assert sum(value for value, _ in alone) == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(
        torch.stack([value for _, value in alone]).sum(0), gradient, atol=1e-5, rtol=1e-4
    )


def test_order_of_the_rows_does_not_matter(model: str, other_model: str) -> None:
    rows = random_rows(13)
    loss, gradient = loss_and_gradient(trainee_of(model, other_model, 60), rows)
    other_loss, other_gradient = loss_and_gradient(trainee_of(model, other_model, 60), rows[::-1])
    assert other_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(model: str, other_model: str) -> None:
    rows = random_rows(6)
    _, gradient = loss_and_gradient(trainee_of(model, other_model, 60), rows)
    _, recomputed = loss_and_gradient(
        trainee_of(model, other_model, 60, gradient_checkpointing=True), rows
    )
    torch.testing.assert_close(recomputed, gradient, atol=1e-6, rtol=1e-5)


def test_chunks_of_the_output_layer_change_no_gradient(model: str, other_model: str) -> None:
    rows = random_rows(6)
    whole = trainee_of(model, other_model, 10_000)
    loss, gradient = loss_and_gradient(whole, rows)
    chunked = trainee_of(model, other_model, 10_000)
    assert isinstance(chunked.backend, TorchBackend)
    chunked.backend._policy.model.get_output_embeddings().chunk_tokens = 5
    chunked_loss, chunked_gradient = loss_and_gradient(chunked, rows)
    assert chunked_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(chunked_gradient, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 30, 100, 10_000])
def test_every_row_is_in_one_micro_batch_and_all_ranks_have_as_many(
    ranks: int, max_tokens: int
) -> None:
    rng = np.random.default_rng(max_tokens + ranks)
    lengths = rng.integers(1, 40, 23).tolist()
    shared = shares(lengths, max_tokens=max_tokens, ranks=ranks)
    placed = [index for rank in shared for part in rank for index in part]
    assert sorted(placed) == list(range(23))
    assert {len(rank) for rank in shared} == {len(shared[0])}
    for part in (part for rank in shared for part in rank):
        chosen = [lengths[index] for index in part]
        assert len(part) <= 1 or sum(chosen) <= max_tokens


def test_ranks_carry_about_the_same_number_of_tokens() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 64).tolist()
    shared = shares(lengths, max_tokens=400, ranks=2)
    tokens = [sum(lengths[i] for part in rank for i in part) for rank in shared]
    assert max(tokens) <= 1.1 * min(tokens)


def step_costs(shared: list[list[list[int]]], lengths: list[int]) -> tuple[float, float]:
    """The costliest rank over the mean; the same where ranks wait for each other at each turn."""
    costs = [[sum(LONG_CONTEXT(lengths[i]) for i in part) for part in rank] for rank in shared]
    mean = sum(map(sum, costs)) / len(costs)
    in_lock_step = sum(max(turn) for turn in zip(*costs, strict=True))
    return max(map(sum, costs)) / mean, in_lock_step / mean


@pytest.mark.parametrize("seed", range(4))
def test_balancing_cost_leaves_ranks_less_to_wait_for_than_balancing_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(1500), 1.0, 1024), 16, 32768).astype(int).tolist()
    by_tokens, by_cost = (
        step_costs(shares(lengths, max_tokens=32768, ranks=4, cost=cost), lengths)
        for cost in (BY_TOKENS, LONG_CONTEXT)
    )
    assert by_cost[0] < 1.04
    assert by_cost[1] - 1 < 0.35 * (by_tokens[1] - 1)


def test_one_long_row_is_balanced_by_cost_with_more_tokens_in_shorter_ones() -> None:
    # Cost n + n**2 / 100: the row of 200 costs 600, one of 50 costs 75, eight of them as much.
    cost = RowCost(per_token=100, per_pair=1)
    lengths = [200] + [50] * 8
    assert shares(lengths, max_tokens=400, ranks=2, cost=cost) == [[[0]], [[*range(1, 9)]]]
    by_tokens = shares(lengths, max_tokens=400, ranks=2)
    assert sorted(len(part) for rank in by_tokens for part in rank) == [3, 6]


def test_the_token_budget_holds_where_cost_alone_would_break_it() -> None:
    cost = RowCost(per_token=100, per_pair=1)
    shared = shares([200] + [50] * 8, max_tokens=300, ranks=2, cost=cost)
    tokens = [sum(200 if i == 0 else 50 for i in part) for rank in shared for part in rank]
    assert sorted(tokens) == [300, 300]


def test_cost_of_a_row_is_worked_by_hand() -> None:
    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    # Head size 2, so A = 8 and K = 4. A layer: 8 * (8 + 8) + 8 * 8 + 3 * 8 * 10 = 432.
    # Three layers and the output layer: 1296 + 800 = 2096 for a token, 3 * 8 for a pair.
    assert RowCost.of_model(config)(5) == 2096 * 5 + 24 * 25


def test_balancing_cost_changes_neither_loss_nor_gradient(model: str, other_model: str) -> None:
    rows = random_rows(13)
    steep = RowCost(per_token=1, per_pair=1)
    loss, gradient = loss_and_gradient(trainee_of(model, other_model, 60), rows)
    other = trainee_of(model, other_model, 60, row_cost=steep)
    assert [b.places for b in other.blocks(rows)] != [
        b.places for b in trainee_of(model, other_model, 60).blocks(rows)
    ]
    other_loss, other_gradient = loss_and_gradient(other, rows)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_a_rank_without_rows_computes_a_row_that_counts_for_nothing(
    model: str, other_model: str
) -> None:
    row = random_rows(1)[0]
    both = [blocks([row], max_tokens=100, rank=rank, ranks=2) for rank in (0, 1)]
    assert [len(rank) for rank in both] == [1, 1]
    assert both[0][0].rows == (row,)
    idle = both[1][0].rows[0]
    assert not idle.weights.any()
    _, gradient = loss_and_gradient(trainee_of(model, other_model, 100), [weightless(row)])
    assert not gradient.any()
    assert (idle.origins == Origin.GUIDANCE).all()  # no token enters a metric


def test_a_row_without_context_is_refused() -> None:
    row = replace(random_rows(1)[0], context=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="row 0 of group 0 has 0 context"):
        blocks([row], max_tokens=100, rank=0, ranks=1)


def test_a_model_whose_logits_are_soft_capped_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.1,
        attn_logit_softcapping=None,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM.*cannot be trained here"):
        load_policy(str(tmp_path), torch_config(), temperature=1.0)


def test_a_model_file_with_a_nan_names_the_weight(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight") as raised:
        load_policy(folder, torch_config(), temperature=1.0)
    assert "download the model again" in str(raised.value)
    assert "across rows" not in str(raised.value)
