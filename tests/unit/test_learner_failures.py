"""What the learner says when a step cannot be done: whose number it was."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.errors import NonFinite
from grpo.objective import Objective, Surrogate
from tests.unit.learner_cases import (
    batch_of,
    overflowing_row,
    random_rows,
    rank_of,
    row_of,
    torch_config,
    write_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


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


def test_the_divergence_of_engine_and_learner_is_measured(model: str, tmp_path: Path) -> None:
    """Engine 0.5 above the learner on one of 4 tokens: k3 is exp(-0.5) - 1 + 0.5 = 0.10653."""
    learner = rank_of(model, torch_config())
    row = replace(row_of(3, 4), origins=np.zeros(4, np.uint8), versions=np.zeros(4, np.int32))
    log_probs = np.asarray(learner.log_probs([row])[0], np.float32)
    log_probs[1] += 0.5
    metrics = learner.train(batch_of([replace(row, behaviour_log_probs=log_probs)])).metrics
    assert metrics["log_prob_gap/kl"] == pytest.approx(0.10653 / 4, rel=1e-3)
