"""A learner that was saved on two ranks goes on with one, with two, in torch, and back again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from grpo.errors import Fatal
from learner.config import LearnerConfig
from tests.equivalence.learner_processes import Outcome, image_of, outcomes_of
from tests.unit.learner_cases import (
    batch_of,
    random_rows,
    rank_of,
    save,
    torch_config,
    write_model,
)

pytestmark = pytest.mark.slow

SETTINGS: dict[str, object] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "max_tokens_per_microbatch": 50,
}
STAGES = (2, 3)
STEPS = 4
NAMES = [f"zero{stage}" for stage in STAGES]
# Adam divides by the root of the squared gradient: where that is tiny, rounding shows.
WEIGHT_TOLERANCE = 1e-5


def run_part(
    config: LearnerConfig,
    *,
    model: str,
    rank: int,
    master: str,
    folder: Path,
    begin: int = 0,
    source: Path | None = None,
    save_before: int | None = None,
) -> Outcome:
    """Steps `begin` to the last: one entry of metrics each, and the weights at the end."""
    learner = rank_of(model, config, rank=rank, master=master)
    if source is not None:
        learner.load(str(source / folder.name))
    outcome = Outcome()
    for step in range(begin, STEPS):
        if step == save_before:
            save(learner, folder)
        rows = random_rows(12, seed=step)
        outcome.metrics.append(dict(learner.train(batch_of(rows[:7], rows[7:], step=step)).metrics))
    outcome.image = image_of(learner)
    learner.close()
    return outcome


def run_on_two(
    config: LearnerConfig, *, model: str, rank: int, master: str, folder: Path
) -> Outcome:
    """All steps with a save before step 2; then from there; then from what torch had saved."""
    part = partial(run_part, config, model=model, rank=rank, master=master, folder=folder)
    whole = part(save_before=2)
    resumed = part(begin=2, source=folder.parent)
    from_torch = part(begin=2, source=folder.parent.parent / "torch")
    whole.resumed_image = resumed.image
    whole.metrics += resumed.metrics + from_torch.metrics
    return whole


def config_of(stage: int, ranks: int) -> LearnerConfig:
    return LearnerConfig.model_validate(SETTINGS | {"zero_stage": stage, "ranks": ranks})


def first_ranks(folder: Path, *, ranks: int, model: str, run: object) -> dict[str, Outcome]:
    """Outcomes of rank 0 by name, none of them an error on any rank."""
    configs = {name: config_of(s, ranks) for name, s in zip(NAMES, STAGES, strict=True)}
    of_ranks = outcomes_of(configs, ranks=ranks, model=model, folder=folder, run=run)  # type: ignore[arg-type]  # a partial
    for outcomes in of_ranks:
        for outcome in outcomes.values():
            assert not outcome.error, outcome.error
    return of_ranks[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def by_torch(model: str, folder: Path) -> Outcome:
    """All steps in this process, saved before step 2 where the ranks of each case look."""
    part = partial(run_torch, model=model, folder=folder)
    for name in NAMES:
        whole = part(name=name, save_before=2)
    return whole


@pytest.fixture(scope="module")
def on_two(by_torch: Outcome, model: str, folder: Path) -> dict[str, Outcome]:
    return first_ranks(folder / "two", ranks=2, model=model, run=run_on_two)


@pytest.fixture(scope="module")
def then_on_one(on_two: dict[str, Outcome], model: str, folder: Path) -> dict[str, Outcome]:
    """Steps 2 and 3 by one rank, from what two had saved."""
    run = partial(run_part, begin=2, source=folder / "two")
    return first_ranks(folder / "one", ranks=1, model=model, run=run)


def run_torch(*, model: str, folder: Path, name: str, **part: Any) -> Outcome:
    environment = dict(os.environ)
    outcome = run_part(
        torch_config(**SETTINGS),
        model=model,
        rank=0,
        master="127.0.0.1:1",
        folder=folder / "torch" / name,
        **part,
    )
    os.environ.clear()
    os.environ.update(environment)
    return outcome


def assert_same_trace(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for metrics, others in zip(found, expected, strict=True):
        assert metrics == pytest.approx(others, abs=1e-4)


def assert_goes_on(found: Outcome, whole: Outcome) -> None:
    """The trace from step 2 on and the last weights are those of the uninterrupted run."""
    assert_same_trace(found.metrics, whole.metrics[2:STEPS])
    weights, others = load(found.image), load(whole.image)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_ranks_go_on_exactly(on_two: dict[str, Outcome], name: str) -> None:
    trace = on_two[name].metrics
    assert trace[STEPS : STEPS + 2] == trace[2:STEPS]
    assert on_two[name].resumed_image == on_two[name].image
    assert trace[2]["grad_norm"] != trace[3]["grad_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_goes_on_from_two(
    on_two: dict[str, Outcome], then_on_one: dict[str, Outcome], name: str
) -> None:
    assert_goes_on(then_on_one[name], on_two[name])


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_go_on_from_one(by_torch: Outcome, on_two: dict[str, Outcome], name: str) -> None:
    assert_same_trace(on_two[name].metrics[STEPS + 2 :], by_torch.metrics[2:])


@pytest.mark.parametrize("name", NAMES)
def test_torch_goes_on_from_two_ranks_of_deepspeed(
    on_two: dict[str, Outcome], model: str, folder: Path, name: str
) -> None:
    outcome = run_torch(model=model, folder=folder, name=name, begin=2, source=folder / "two")
    assert_goes_on(outcome, on_two[name])


def test_a_file_of_one_rank_that_is_missing_is_noticed(
    on_two: dict[str, Outcome], model: str, folder: Path
) -> None:
    torn = folder / "two" / "zero2" / "learner" / "rank_1.safetensors"
    image = torn.read_bytes()
    torn.unlink()
    try:
        with pytest.raises(Fatal, match=r"holds .* of .* elements of|does not hold model\."):
            rank_of(model, torch_config()).load(str(folder / "two" / "zero2"))
    finally:
        torn.write_bytes(image)
