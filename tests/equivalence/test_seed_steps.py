"""Two real steps of each seed algorithm from its own recipe, on CPU in this process.

The driver, the starter model, the transformers engine, rule scorers and the plain torch learner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from grpo.guidance import GuidanceState
from grpo.pipeline import State
from grpo.types import Group, Origin
from orchestration.checkpoint import decoded_state, encoded_state
from orchestration.config import Recipe, load_recipe
from orchestration.driver import TrainedStep
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from tests.fakes import FakeJournal
from tests.real_driver import real_driver

ROOT = Path(__file__).parents[2]
STEPS, GROUPS = 2, 4


def shipped(name: str, folder: Path, *overrides: str) -> Recipe:
    data = write_datasets(folder / "data", num_train=60, num_heldout=10)
    return local_recipe(
        load_recipe(
            ROOT / "recipes" / f"{name}.yaml",
            [
                f"steps={STEPS}",
                f"num_prompts_per_step={GROUPS}",
                f"data.train={data.train}",
                "data.evaluation=null",
                "learner.learning_rate=1e-3",
                "learner.warmup_steps=0",
                "max_staleness=0",
                *overrides,
            ],
        )
    )


async def driven(recipe: Recipe) -> tuple[list[TrainedStep], State]:
    journal = FakeJournal()
    async with started_roles(
        recipe, local=True, waits=Waits(), on_phase=lambda name: None
    ) as roles:
        driver = real_driver(recipe, roles, journal)
        initial = driver.progress.algorithm_state
        assert await driver.run()
    state = driver.progress.algorithm_state
    assert decoded_state(initial, encoded_state(state)) == state
    assert not journal.fallen
    return journal.steps, state


def run(recipe: Recipe) -> tuple[list[Group], list[Mapping[str, float]], State]:
    steps, state = asyncio.run(driven(recipe))
    metrics = [step.metrics for step in steps]
    for step in metrics:
        assert all(np.isfinite(value) for value in step.values())
        assert step["grad_norm"] > 0
        assert step["log_prob_gap/max"] < 1e-4
    return [done.group for step in steps for done in step.groups], metrics, state


def test_lambda_grpo_trains_two_steps_and_finds_trees(tmp_path: Path) -> None:
    _, metrics, _ = run(shipped("lambda_grpo_prm", tmp_path))
    assert all(step["process_sets/frac_flat"] < 1 for step in metrics)
    assert all(step["process_sets/mean_size"] > 1 for step in metrics)


@pytest.mark.parametrize("in_loss", ["true", "false"])
def test_g2rpo_a_trains_two_steps_on_answers_that_continue_the_solution(
    tmp_path: Path, in_loss: str
) -> None:
    groups, metrics, state = run(
        shipped("g2rpo_a", tmp_path, f"algorithm.guidance_in_loss={in_loss}")
    )
    for group in groups:
        counts = [int((r.origins == Origin.GUIDANCE).sum()) for r in group.rollouts]
        assert all(counts[:2]) and not any(counts[2:])
        for rollout, count in zip(group.rollouts, counts, strict=True):
            given = group.prompt.solution_tokens[:count]
            np.testing.assert_array_equal(rollout.tokens[:count], given)
            assert 6 not in given  # "answer: " of the starter tokenizer
            assert rollout.text.startswith("".join(group.prompt.columns["solution"][:count]))
    assert metrics[0]["guidance/frac_guided"] == pytest.approx(1 / 6)
    assert isinstance(state, GuidanceState) and state.num_steps == STEPS
    assert state.recent == tuple(step["rewards/answer/mean"] for step in metrics)


def test_sgpo_trains_two_steps_and_judges_the_steps_of_wrong_answers(tmp_path: Path) -> None:
    groups, metrics, _ = run(shipped("sgpo", tmp_path, "algorithm.scope=every_wrong"))
    judged = 0
    for group in groups:
        wrong = {i for i, value in enumerate(group.outcomes("answer")) if value == 0}
        spans = {s.span.rollout for s in group.scores if s.scorer == "steps"}
        assert spans <= wrong
        judged += len(spans)
    assert judged > 0
    assert all(0 <= step["judge/right_share"] < 1 for step in metrics)
