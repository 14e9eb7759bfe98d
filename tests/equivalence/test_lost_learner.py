"""A learner that is lost in the middle of a run changes nothing in what the run leaves behind.

Real engine, scorer and learner in this process; the learner fails for good at chosen calls, as if
its processes had been killed, until it is started again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.errors import Fatal, StateLost, UserError
from grpo.types import Float32, MeasureRequest, StepReport, TrainBatch, TrainRow, WeightRef
from orchestration.checkpoint import latest_checkpoint, read_driver_state
from orchestration.config import Recipe
from orchestration.display import Display
from orchestration.found_run import recipe_of_run
from orchestration.ledger import audited, read_entries
from orchestration.roles import Learner, local_learner, local_parts, local_recipe, started_parts
from orchestration.run_inputs import read_inputs
from orchestration.run_records import opened_records
from orchestration.starter.data import write_datasets
from orchestration.stops import StopSignals
from orchestration.training import Training
from orchestration.waits import Waits
from tests.end_to_end.runs import MODEL

pytestmark = pytest.mark.slow
T = TypeVar("T")
Call = tuple[str, int]  # method, and which of its calls


class LossyLearner:
    """A local learner that is lost at these calls, and answers nothing until it is restarted."""

    def __init__(self, recipe: Recipe, first: Learner, losses: Sequence[Call]) -> None:
        self.num_ranks = 1
        self.starts: list[int] = []  # ranks that were asked for
        self._recipe = recipe
        self._losses = losses
        self._calls: Counter[str] = Counter()
        self._is_lost = False
        self._inner = first

    async def restart(self, num_ranks: int) -> None:
        self.starts.append(num_ranks)
        self._is_lost = False
        if num_ranks > 2:
            raise StateLost("the learner is lost: no room")
        self.num_ranks = num_ranks
        self._inner = fresh = local_learner(self._recipe, asyncio.Lock())
        await fresh.start()

    async def close(self) -> None:
        pass

    async def train(self, batch: TrainBatch) -> StepReport:
        return await self._unless_lost("train", self._inner.train(batch))

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        return await self._unless_lost("measure", self._inner.measure(request))

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        return await self._unless_lost("log_probs", self._inner.log_probs(rows))

    async def publish(self, version: int) -> WeightRef:
        return await self._unless_lost("publish", self._inner.publish(version))

    async def snapshot(self) -> None:
        await self._unless_lost("snapshot", self._inner.snapshot())

    async def write(self, folder: Path) -> list[str]:
        return await self._unless_lost("write", self._inner.write(folder))

    async def load(self, folder: Path) -> None:
        await self._unless_lost("load", self._inner.load(folder))

    async def _unless_lost(self, method: str, call: Awaitable[T]) -> T:
        result = await call  # the work is done, and nobody hears of it
        self._calls[method] += 1
        self._is_lost |= (method, self._calls[method]) in self._losses
        if self._is_lost:
            raise StateLost("the learner is lost: killed by the test")
        return result


@dataclass(frozen=True)
class Left:
    """What a run left behind."""

    path: Path
    learner: LossyLearner

    @property
    def steps(self) -> list[dict[str, float]]:
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "reward" in line]

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        folder = latest_checkpoint(self.path)
        assert folder is not None
        model = AutoModelForCausalLM.from_pretrained(folder / "huggingface")
        state: Mapping[str, torch.Tensor] = model.state_dict()
        return state

    @property
    def problems(self) -> tuple[str, ...]:
        folder = latest_checkpoint(self.path)
        assert folder is not None
        state = read_driver_state(folder)
        entries = read_entries(self.path / "groups.jsonl")
        return audited(entries, state, window=1, planned=None).problems


def trained(
    folder: Path,
    *,
    losses: Sequence[Call] = (),
    ranks: int | None = None,
    lora: Mapping[str, object] | None = None,
) -> Left:
    """A run of six steps; `ranks` are asked for when it begins."""
    data = write_datasets(folder / "data", num_train=60, num_heldout=10)
    recipe = local_recipe(
        Recipe.model_validate(
            {
                "name": "lossy",
                "seed": 3,
                "model": str(MODEL),
                "steps": 6,
                "num_prompts_per_step": 4,
                "sampling": {"max_completion_length": 40, "max_prompt_length": 40},
                "data": {"train": str(data.train)},
                "algorithm": {"name": "grpo", "num_generations": 4},
                "scorers": [{"name": "answer", "rule": "numeric"}],
                "learner": {"learning_rate": 1e-4, "warmup_steps": 0, "lora": lora},
                "checkpoint": {"every": 2},
                "output": str(folder / "runs"),
            }
        )
    )
    parts = local_parts(recipe)
    learner = LossyLearner(recipe, parts.learner, losses)
    make = replace(parts, learner=learner, restartable=learner)

    async def run() -> Path:
        waits = Waits()
        with Display.open() as display, opened_records(read_inputs(recipe, None), display) as kept:
            async with started_parts(recipe, make, waits=waits) as roles:
                training = Training(roles, kept, waits, StopSignals(display.message))
                if ranks is not None:
                    training.request_ranks(ranks)
                assert await training.run()
            return kept.path

    return Left(asyncio.run(run()), learner)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "losses",
    [
        [("train", 1)],  # before there is any checkpoint
        [("train", 4), ("publish", 6)],
        [("snapshot", 2)],
        [("write", 2), ("load", 1)],  # while it is saved, and once more while it is loaded
        [("write", 3)],  # of the last checkpoint: the steps behind the one before are done again
    ],
    ids=str,
)
def test_a_run_that_loses_its_learner_ends_as_one_that_does_not(
    losses: Sequence[Call], whole: Left, tmp_path: Path
) -> None:
    left = trained(tmp_path, losses=losses)
    assert left.learner.starts == [1] * len(losses)
    assert left.problems == ()
    assert [step["step"] for step in left.steps] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(left.steps, whole.steps, strict=True):
        assert mine["reward"] == other["reward"]
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(left.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_learner_with_a_rounded_base_may_be_lost_before_the_workers_have_it(
    tmp_path: Path,
) -> None:
    left = trained(tmp_path, losses=[("publish", 1)], lora={"quantization": "nf4"})
    assert left.learner.starts == [1]
    assert left.problems == ()
    assert max(step["log_prob_gap/max"] for step in left.steps) < 1e-4


def test_a_learner_that_is_lost_again_and_again_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"loss 4 without a new\s+checkpoint"):
        trained(tmp_path, losses=[("train", call) for call in range(3, 30)])


def test_other_ranks_are_in_force_after_a_checkpoint(whole: Left, tmp_path: Path) -> None:
    left = trained(tmp_path, ranks=2)
    assert left.learner.starts == [2]
    assert left.problems == ()
    assert [step["reward"] for step in left.steps] == [step["reward"] for step in whole.steps]


def test_ranks_that_cannot_be_started_leave_those_there_were(whole: Left, tmp_path: Path) -> None:
    left = trained(tmp_path, ranks=3)
    assert left.learner.starts == [3, 1]
    assert [step["reward"] for step in left.steps] == [step["reward"] for step in whole.steps]


def test_a_run_killed_right_after_it_went_back_goes_on_from_there(
    whole: Left, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole.path, tmp_path / "run"))
    inputs = read_inputs(recipe_of_run(run), str(run / "checkpoints" / "step_4"))
    with Display.open() as display, opened_records(inputs, display):
        pass  # killed before its first step
    left = replace(whole, path=run)
    found = read_inputs(recipe_of_run(run), str(run))
    assert found.state is not None and found.state.step == 4
    assert [step["step"] for step in left.steps] == [1, 2, 3, 4]
    assert left.problems == ()


def test_a_run_that_began_before_a_setting_existed_is_resumed(whole: Left, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole.path, tmp_path / "run"))
    recipe = recipe_of_run(run)
    text = (run / "config.yaml").read_text()
    assert "learner_losses: 3\n" in text
    assert "window: 1\n" in text
    (run / "config.yaml").write_text(
        text.replace("  learner_losses: 3\n", "").replace("window: 1\n", "")
    )
    inputs = read_inputs(recipe, str(run))
    assert inputs.progress_at(inputs.state).step == 6
    with pytest.raises(UserError, match="window: was 1, is 2"):
        read_inputs(recipe.model_copy(update={"window": 2}), str(run))
