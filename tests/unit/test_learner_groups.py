"""Group terms and the learnable scalar in a real model, against plain autograd over whole groups.

The expected numbers come from transformers' own forward pass of each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo.errors import NonFinite
from grpo.objective import Objective
from grpo.types import StepReport, TrainRow
from learner.packing import Block
from learner.policy import load_policy
from learner.scalar import Scalar
from learner.torch_backend import TorchBackend
from learner.update import Trainee, run_step
from tests.unit.learner_cases import batch_of, random_rows, torch_config, write_model
from tests.unit.learner_objectives import (
    CONTRAST,
    LENGTH_SCALAR,
    PLAIN,
    REGRESSION,
    contrast_loss,
    length_weights,
)

TEMPERATURE = 0.8
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


class Watched(TorchBackend):
    """Remembers the weights before each update and their gradient, and counts forward passes."""

    def __init__(self, model: str) -> None:
        self.policy = load_policy(model, torch_config(), temperature=TEMPERATURE)
        super().__init__(self.policy, torch_config())
        self.updates: list[tuple[Weights, Weights]] = []
        self.num_passes = 0

    def forward(
        self, block: Block, *, with_entropy: bool = False, with_hidden: bool = False
    ) -> tuple[Tensor, ...]:
        self.num_passes += 1
        return super().forward(block, with_entropy=with_entropy, with_hidden=with_hidden)

    def step(self, learning_rate: float) -> float:
        named = dict(self.policy.model.named_parameters())
        weights = {name: weight.detach().clone() for name, weight in named.items()}
        gradients = {name: weight.grad.clone() for name, weight in named.items()}
        self.updates.append((weights, gradients))
        return super().step(learning_rate)


def trained(
    model: str,
    objective: Objective,
    *updates: Sequence[TrainRow],
    max_tokens: int = 60,
    scalar: Scalar | None = None,
) -> tuple[Watched, StepReport]:
    """Run one step of these updates."""
    backend = Watched(model)
    trainee = Trainee(
        backend=backend,
        objective=objective,
        reference=None,
        scalar=scalar,
        config=torch_config(max_tokens_per_microbatch=max_tokens),
        rank=0,
        ranks=1,
    )
    return backend, run_step(trainee, batch_of(*updates), learning_rate=1e-2)


def gradient_of(
    model: str,
    weights: Weights,
    rows: Sequence[TrainRow],
    loss: Callable[[list[Tensor]], Tensor],
) -> Weights:
    """By autograd through rows that run alone; `loss` reads the [T] log-probabilities of each."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in loaded.named_parameters():
            weight.copy_(weights[name])
    parameters: dict[str, nn.Parameter] = dict(loaded.named_parameters())
    total = loss([log_probs_alone(loaded, row) for row in rows])
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def log_probs_alone(loaded: nn.Module, row: TrainRow) -> Tensor:
    tokens = torch.from_numpy(np.concatenate([row.context, row.tokens]).astype(np.int64))
    logits = loaded(tokens[None]).logits[0, len(row.context) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, tokens[len(row.context) :, None])[:, 0]


def assert_same(gradient: Weights, expected: Weights) -> None:
    assert max(value.abs().max().item() for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=2e-5, rtol=1e-3)


def is_trained(row: TrainRow) -> Tensor:
    return torch.from_numpy(row.weights != 0)


def averaging(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """Rows whose loss is a mean over their trained tokens."""
    masks = [row.weights != 0 for row in rows]
    return [
        replace(
            row,
            weights=(mask / max(1, mask.sum())).astype(np.float32),
            policy_weights=np.ones_like(row.policy_weights),
        )
        for row, mask in zip(rows, masks, strict=True)
    ]


def adding(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """Rows whose loss is a sum over their trained tokens."""
    return [
        replace(
            row,
            weights=(row.weights != 0).astype(np.float32),
            policy_weights=np.ones_like(row.policy_weights),
        )
        for row in rows
    ]


def by_group(rows: Sequence[TrainRow], values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Values and advantages of each group, stacked."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.group, []).append(place)
    return [
        (
            torch.stack([values[i] for i in own]),
            torch.tensor([float(rows[i].advantages[0]) for i in own]),
        )
        for own in places.values()
    ]


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_a_contrast_of_answers_trains_on_its_own_gradient(model: str, max_tokens: int) -> None:
    rows = averaging(random_rows(11))
    backend, _ = trained(model, CONTRAST, rows, max_tokens=max_tokens)
    ((weights, gradient),) = backend.updates

    def loss(log_probs: list[Tensor]) -> Tensor:
        means = [v[is_trained(row)].mean() for v, row in zip(log_probs, rows, strict=True)]
        return sum(contrast_loss(scores, tau=0.5) for scores, _ in by_group(rows, means))

    assert_same(gradient, gradient_of(model, weights, rows, loss))


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_every_update_is_scored_under_the_policy_it_finds(model: str, max_tokens: int) -> None:
    rows = adding(random_rows(8))
    # The first group is trained twice: at the second time the policy has left its own answers.
    backend, _ = trained(model, REGRESSION, rows[:4], rows[4:], rows[:4], max_tokens=max_tokens)
    start = {}

    def loss(log_probs: list[Tensor]) -> Tensor:
        start.setdefault("log_probs", [v.detach() for v in log_probs])
        pairs = zip(log_probs, start["log_probs"], rows, strict=False)
        sums = [(now - then)[is_trained(row)].sum() for now, then, row in pairs]
        ((own, rewards),) = by_group(rows[:4], sums)
        gaps = own - 0.3 * rewards
        return (gaps[:, None] - gaps[None]).square().mean()

    for weights, gradient in (backend.updates[0], backend.updates[2]):
        assert_same(gradient, gradient_of(model, weights, rows[:4], loss))
    first, _, again = (update[1] for update in backend.updates)
    assert any((first[name] - again[name]).abs().max() > 1e-2 for name in first)


def test_rows_that_come_again_are_compared_with_the_start_of_the_step_once(model: str) -> None:
    rows = adding(random_rows(8))
    plain, _ = trained(model, PLAIN, rows[:4], rows[4:], rows[:4], rows[4:], max_tokens=10_000)
    assert plain.num_passes == 2 + 4  # the start of the step for two updates, then four updates
    scored, _ = trained(model, REGRESSION, rows[:4], rows[4:], rows[:4], max_tokens=10_000)
    assert scored.num_passes == 2 + 3 + 2  # the first update is scored by the start of the step
    alone, report = trained(model, REGRESSION, rows[:4], max_tokens=10_000)
    assert alone.num_passes == 2
    assert "group_term" in report.timings_s


def test_several_epochs_repeat_the_updates(model: str) -> None:
    rows = random_rows(8)
    copies = [replace(row) for row in rows]  # the same numbers, another object
    repeated, _ = trained(model, PLAIN, rows[:4], rows[4:], rows[:4])
    copied, _ = trained(model, PLAIN, rows[:4], rows[4:], copies[:4])
    for name, weight in repeated.policy.model.named_parameters():
        assert torch.equal(weight, dict(copied.policy.model.named_parameters())[name])


def test_a_group_term_that_returns_no_number_leaves_the_weights_untouched(model: str) -> None:
    spoilt = replace(CONTRAST, group_term=lambda rows: [np.nan] * len(rows))
    with pytest.raises(NonFinite, match="the advantage is nan at completion token 0"):
        trained(model, spoilt, random_rows(4))


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_the_scalar_and_the_policy_follow_the_gradient_of_one_loss(
    model: str, max_tokens: int
) -> None:
    rows = random_rows(11)
    scalar = Scalar(LENGTH_SCALAR)
    objective = replace(PLAIN, learnable=LENGTH_SCALAR)
    backend, report = trained(model, objective, rows, max_tokens=max_tokens, scalar=scalar)
    ((weights, gradient),) = backend.updates
    value = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found: list[float] = []

    def loss(log_probs: list[Tensor]) -> Tensor:
        of_rows = [row_loss(row, now) for row, now in zip(rows, log_probs, strict=True)]
        lengths = [torch.tensor(float(np.count_nonzero(row.weights))) for row in rows]
        groups = zip(by_group(rows, of_rows), by_group(rows, lengths), strict=True)
        total = sum(
            (length_weights(of_group[0].double(), value) * own).sum()
            for (own, _), of_group in groups
        )
        (of_value,) = torch.autograd.grad(total, value, retain_graph=True)
        found.append(of_value.item())
        return total

    assert_same(gradient, gradient_of(model, weights, rows, loss))
    assert abs(found[0]) > 1e-3
    assert scalar.value == pytest.approx(0.5 - 0.1 * found[0], abs=1e-6)
    assert report.metrics["length_preference"] == scalar.value


def row_loss(row: TrainRow, log_probs: Tensor) -> Tensor:
    """The policy term of one row: its ratio is 1, so it is not clipped."""
    ratio = (log_probs - log_probs.detach()).exp()
    scale = torch.from_numpy(row.weights * row.policy_weights * row.advantages)
    return -(scale * ratio).sum()


def test_a_refused_update_leaves_the_scalar_where_it_was(model: str) -> None:
    rows = random_rows(4)
    rows[2] = replace(rows[2], advantages=np.full_like(rows[2].advantages, np.nan))
    scalar = Scalar(LENGTH_SCALAR)
    with pytest.raises(NonFinite):
        trained(model, replace(PLAIN, learnable=LENGTH_SCALAR), rows, scalar=scalar)
    assert scalar.value == 0.5


def test_every_update_finds_the_scalar_that_the_last_one_left(model: str) -> None:
    rows = random_rows(8)
    objective = replace(PLAIN, learnable=LENGTH_SCALAR)
    twice, once = Scalar(LENGTH_SCALAR), Scalar(LENGTH_SCALAR)
    trained(model, objective, rows[:4], scalar=once)
    after_one = once.value
    trained(model, objective, rows[:4], rows[4:], scalar=twice)
    assert len({0.5, after_one, twice.value}) == 3


def test_a_scalar_that_does_not_learn_changes_nothing_where_its_weights_are_one(model: str) -> None:
    rows = random_rows(8)
    ones = replace(LENGTH_SCALAR, weights=lambda lengths, value: lengths * 0 + 1)
    weighed, report = trained(
        model, replace(PLAIN, learnable=ones), rows, scalar=Scalar(ones), max_tokens=40
    )
    plain, expected = trained(model, PLAIN, rows, max_tokens=40)
    for name, gradient in weighed.updates[0][1].items():
        assert torch.equal(gradient, plain.updates[0][1][name])
    assert dict(report.metrics) == {**expected.metrics, "length_preference": 0.5}
