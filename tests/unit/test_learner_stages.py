"""Stages, a reference that follows the policy, and what of both survives a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.errors import Fatal
from grpo.objective import Objective, Penalty, ReferenceUpdate, Signal
from grpo.penalties import k2
from grpo.types import TrainRow
from learner.packing import Block
from learner.policy import load_policy
from learner.rank import LearnerRank
from learner.reference import Reference, WithoutAdapters
from learner.weights import named_weights
from tests.unit.learner_cases import batch_of, random_rows, rank_of, save, torch_config, write_model
from tests.unit.learner_objectives import PLAIN, REGRESSION, WHOLE_GROUPS

CPU = torch.device("cpu")
AGAINST_REFERENCE = replace(
    PLAIN,
    penalties=(Penalty(name="kl", coefficient=0.1, fn=k2),),
    needs=frozenset({Signal.REFERENCE}),
)


WITH_SCALE = replace(
    AGAINST_REFERENCE,
    penalties=(Penalty(name="kl", coefficient=0.1, fn=k2, scale=lambda mean: 1.0),),
)


class WatchedReference(Reference):
    """Notes when it is fetched, what it is asked, and when it is let go."""

    def __init__(self, reference: Reference | WithoutAdapters | None) -> None:
        assert isinstance(reference, Reference)
        self._reference = reference
        self.events: list[object] = []

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        self.events.append("fetched")
        with self._reference.at_hand():
            yield
        self.events.append("let go")

    def log_probs(self, block: Block) -> Tensor:
        self.events.append(block.places)
        return self._reference.log_probs(block)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def following(*, every: int, decay: float) -> Objective:
    return replace(AGAINST_REFERENCE, reference_update=ReferenceUpdate(every=every, decay=decay))


def checksum(learner: LearnerRank) -> int:
    bundle = learner.publish(0)
    assert bundle is not None
    return bundle.checksum


def reference_of(model: str, *, dtype: str, value: float) -> Reference:
    """A moving reference all of whose weights are `value`."""
    policy = load_policy(model, torch_config(dtype=dtype), temperature=1.0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.fill_(value)
    return Reference(policy, device=CPU, is_moving=True, is_offloaded=False)


def weights_of(model: str, value: float) -> dict[str, Tensor]:
    policy = load_policy(model, torch_config(), temperature=1.0)
    return {name: torch.full_like(w, value) for name, w in named_weights(policy.model).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_a_moving_average(model: str, dtype: str) -> None:
    reference = reference_of(model, dtype=dtype, value=1.0)
    reference.follow([weights_of(model, 2.0)], decay=0.995)
    for _, average in reference.averages():
        assert average.dtype == torch.float32
        assert average.flatten()[0].item() == pytest.approx(1.005, abs=1e-6)
    # In bfloat16 none of these steps would have moved the weight: its spacing at 1 is 1 / 128.
    reference.follow([weights_of(model, 2.0)], decay=0.995)
    reference.follow([weights_of(model, 2.0)], decay=0.995)
    for _, average in reference.averages():
        assert average.flatten()[0].item() == pytest.approx(2 - 0.995**3, abs=1e-6)


def test_a_reference_that_copies_the_policy_has_no_divergence_from_it(model: str) -> None:
    rows = random_rows(8)
    learner = rank_of(model, torch_config(), objective=following(every=2, decay=0.0))
    kl = [learner.train(batch_of(rows, step=step)).metrics["kl"] for step in range(5)]
    # Copies follow steps 2 and 4 (from 1), so that the next step starts at its reference.
    assert [value > 1e-5 for value in kl] == [False, True, False, True, False]
    frozen = rank_of(model, torch_config(), objective=AGAINST_REFERENCE)
    assert [frozen.train(batch_of(rows, step=step)).metrics["kl"] > 1e-5 for step in range(3)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", [None, ReferenceUpdate(every=1, decay=0.5)])
def test_a_reference_in_host_memory_changes_no_bit(
    model: str, dtype: str, update: ReferenceUpdate | None
) -> None:
    objective = replace(AGAINST_REFERENCE, reference_update=update)
    found = []
    for is_offloaded in (False, True):
        config = torch_config(dtype=dtype, reference_offload=is_offloaded)
        learner = rank_of(model, config, objective=objective)
        rows = random_rows(8)
        updates = [rows[:4], rows[4:], rows[:4]]
        metrics = [dict(learner.train(batch_of(*updates)).metrics) for _ in range(2)]
        found.append((metrics, checksum(learner)))
    assert found[1] == found[0]
    assert found[0][0][1]["kl"] > 1e-5


def test_the_reference_is_fetched_once_a_step_and_asked_once_about_each_micro_batch(
    model: str,
) -> None:
    learner = rank_of(model, torch_config(max_tokens_per_microbatch=30), objective=WITH_SCALE)
    watched = WatchedReference(learner._trainee.reference)
    learner._trainee = replace(learner._trainee, reference=watched)
    rows = random_rows(8)
    learner.train(batch_of(rows[:4], rows[4:], rows[:4], rows[4:]))
    blocks = [b.places for part in (rows[:4], rows[4:]) for b in learner._trainee.blocks(part)]
    assert len(blocks) > 2
    assert watched.events == ["fetched", *blocks, "let go"]


def test_without_a_reader_there_is_no_reference(model: str) -> None:
    grpo = rank_of(model, torch_config(), algorithm={"name": "grpo", "num_generations": 4})
    assert grpo._trainee.reference is None
    with_penalty = rank_of(model, torch_config())
    assert isinstance(with_penalty._trainee.reference, Reference)


def test_reference_log_probs_that_rows_bring_are_used(model: str) -> None:
    learner = rank_of(model, torch_config(), objective=AGAINST_REFERENCE)
    rows = random_rows(6)
    found = learner.log_probs(rows)
    known = [
        replace(row, reference_log_probs=np.asarray(values, np.float32) + np.float32(0.3))
        for row, values in zip(rows, found, strict=True)
    ]
    total = sum(float(row.weights.sum()) for row in rows)
    kl = learner.train(batch_of(known)).metrics["kl"]
    assert kl == pytest.approx(0.3**2 / 2 * total, rel=1e-3)
    # One row without them, in the same micro-batch: the reference is asked about all.
    learner = rank_of(model, torch_config(), objective=AGAINST_REFERENCE)
    assert learner.train(batch_of([*known[:5], rows[5]])).metrics["kl"] < 1e-6


def test_a_stage_trains_its_own_loss_at_a_scaled_rate_and_is_no_step(model: str) -> None:
    config = torch_config(lr_scheduler_type="linear")
    objective = replace(PLAIN, stage=REGRESSION)
    learner = rank_of(model, config, objective=objective)
    by_itself = rank_of(model, config, objective=REGRESSION)
    rows = random_rows(8)
    stage = replace(batch_of(rows[:4], rows[4:]), is_stage=True, learning_rate_scale=0.5)
    staged = learner.train(stage).metrics
    expected = by_itself.train(replace(stage, is_stage=False)).metrics
    assert staged["learning_rate"] == pytest.approx(0.005)
    assert staged == pytest.approx(expected)
    assert checksum(learner) == checksum(by_itself)
    rates = [learner.train(batch_of(rows)).metrics["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.01, 0.009, 0.008])
    # The rate of the step before it, so that a stage behind the last step still learns.
    assert learner.train(stage).metrics["learning_rate"] == pytest.approx(0.004)


def test_a_stage_leaves_the_scalar_and_the_reference_alone(model: str, tmp_path: Path) -> None:
    learner = rank_of(model, torch_config(), objective=WHOLE_GROUPS)
    rows = random_rows(4)
    before = learner.train(batch_of(rows)).metrics["length_preference"]
    save(learner, tmp_path / "before")
    metrics = learner.train(replace(batch_of(rows), is_stage=True)).metrics
    assert "length_preference" not in metrics
    save(learner, tmp_path / "after")
    states = [
        (tmp_path / name / "learner" / "reference.safetensors").read_bytes()
        for name in ("before", "after")
    ]
    assert states[0] == states[1]
    # Without a loss to learn from, a step reports the scalar as it was saved.
    fresh = rank_of(model, torch_config(), objective=replace(WHOLE_GROUPS, group_term=None))
    fresh.load(str(tmp_path / "after"))
    idle = [replace(row, advantages=np.zeros_like(row.advantages)) for row in rows]
    assert fresh.train(batch_of(idle)).metrics["length_preference"] == before


def test_a_step_without_a_token_that_counts_leaves_the_policy_where_its_stage_left_it(
    model: str,
) -> None:
    learner = rank_of(
        model, torch_config(weight_decay=0.1), objective=replace(PLAIN, stage=REGRESSION)
    )
    rows = random_rows(4)
    learner.train(replace(batch_of(rows), is_stage=True))
    left = checksum(learner)
    uncounted = [replace(row, weights=np.zeros_like(row.weights)) for row in rows]
    metrics = learner.train(batch_of(uncounted)).metrics
    assert metrics["grad_norm"] == 0
    assert checksum(learner) == left
    learner.train(batch_of(rows))
    assert checksum(learner) != left


def test_a_stage_that_the_objective_does_not_have_is_refused(model: str) -> None:
    learner = rank_of(model, torch_config(), objective=PLAIN)
    with pytest.raises(Fatal, match="the objective has no `stage`"):
        learner.train(replace(batch_of(random_rows(2)), is_stage=True))


def test_an_objective_that_cannot_work_is_refused_before_any_model_is_read() -> None:
    needy = replace(PLAIN, needs=frozenset({Signal.HIDDEN}))
    with pytest.raises(ValueError, match="only a measure can read them"):
        rank_of("/nowhere", torch_config(), objective=needy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_finds_scalar_and_reference_where_they_were(
    model: str, tmp_path: Path, dtype: str
) -> None:
    config = torch_config(dtype=dtype)
    rows = random_rows(8)
    learner = rank_of(model, config, objective=WHOLE_GROUPS)
    for step in range(2):
        learner.train(batch_of(rows[:4], rows[4:], step=step))
    save(learner, tmp_path)
    expected = learner.train(batch_of(rows, step=2)).metrics
    resumed = rank_of(model, config, objective=WHOLE_GROUPS)
    resumed.load(str(tmp_path))
    assert resumed.train(batch_of(rows, step=2)).metrics == expected
    assert checksum(resumed) == checksum(learner)
    assert expected["length_preference"] != 0.5


def crossing(row: TrainRow) -> TrainRow:
    return replace(
        row, is_cross_context=True, behaviour_log_probs=np.full_like(row.behaviour_log_probs, -9)
    )


def test_tokens_of_another_context_are_in_no_comparison_with_the_engine(model: str) -> None:
    learner = rank_of(model, torch_config(), objective=PLAIN)
    rows = random_rows(6)
    known = [
        replace(row, behaviour_log_probs=np.asarray(values, np.float32))
        for row, values in zip(rows, learner.log_probs(rows), strict=True)
    ]
    metrics = learner.train(batch_of([*known[:3], *map(crossing, known[3:])])).metrics
    assert metrics["log_prob_gap/max"] < 1e-4
    assert metrics["importance/mean"] == pytest.approx(1.0, abs=1e-4)
    compared = sum(int((row.origins == 0).sum()) for row in known[:3])
    assert metrics["log_prob_gap/num_tokens"] == compared
