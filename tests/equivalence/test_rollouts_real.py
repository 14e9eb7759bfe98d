"""Ways of making rollouts that no shipped recipe switches on, with the real parts in this process:
answers stopped while they are written, and the groups of one run as the data of another.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from orchestration.config import Recipe, load_recipe
from orchestration.driver import TrainedStep
from orchestration.group_task import GroupTimes
from orchestration.records import trained_record
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from tests.fakes import FakeJournal
from tests.real_driver import real_driver

ROOT = Path(__file__).parents[2]
TIMES = GroupTimes(admitted=0.0, generated=0.0, scored=0.0)


async def driven(recipe: Recipe) -> list[TrainedStep]:
    journal = FakeJournal()
    async with started_roles(recipe, local=True, waits=Waits(), on_phase=lambda _: None) as roles:
        assert await real_driver(recipe, roles, journal).run()
    return journal.steps


def steps_of(name: str, data: Path, *overrides: str) -> list[TrainedStep]:
    small = [
        "steps=2",
        "num_prompts_per_step=3",
        f"data.train={data}",
        "data.evaluation=null",
        "learner.warmup_steps=0",
        "max_staleness=0",
    ]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*small, *overrides])
    return asyncio.run(driven(local_recipe(recipe)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_datasets(tmp_path_factory.mktemp("data"), num_train=60, num_heldout=1).train


def test_answers_are_stopped_while_they_are_written_and_the_rest_is_as_sampled(data: Path) -> None:
    # Longer is worse to this judge, so that every answer is stopped after its second step.
    judge = "{name: shorter, rule: length, weight: 0, max_length: 0, length_slack: 64}"
    steps = steps_of(
        "ws_grpo",
        data,
        "algorithm.preference_scorer=shorter",
        "algorithm.early_stop=true",
        "algorithm.segment_tokens=6",
        'algorithm.stop_phrase="\\nanswer: "',
        "algorithm.stop_room=8",
        f"scorers=[{{name: answer, rule: numeric, require_marker: true}}, {judge}]",
    )
    for step in steps:
        assert step.metrics["early_stop/frac_stopped"] > 0.5
        assert step.metrics["early_stop/budget_saved"] > 0.2
        # The learner's log-probs agree with those that came in pieces.
        assert step.metrics["log_prob_gap"] < 1e-4
        texts = [r.text for item in step.built.rewarded for r in item.group.rollouts]
        assert all("\nanswer: " in text or text.startswith("answer: ") for text in texts)


def test_the_groups_of_a_run_train_another_run_offline(data: Path, tmp_path: Path) -> None:
    online = steps_of("sgpo", data)
    terms = online[0].built.rewarded[0].components.shape[1]
    records = [
        trained_record(item, [], terms=["t"] * terms, times=TIMES, trained=0.0)
        | {"step": step.step}
        for step in online
        for item in step.built.rewarded
    ]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    offline = steps_of("sgpo", path, "algorithm.offline=true")
    stored = {item.group.prompt.text: item.group for s in online for item in s.built.rewarded}
    seen = [item.group for step in offline for item in step.built.rewarded]
    assert {group.prompt.text for group in seen} == set(stored)
    for group in seen:
        for ours, theirs in zip(group.rollouts, stored[group.prompt.text].rollouts, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert set(group.scores) == set(stored[group.prompt.text].scores)
    # One pass over the same groups from the same weights: the first ratio is 1 in both.
    assert np.isfinite([step.metrics["loss"] for step in offline]).all()
    assert any(step.metrics["grad_norm"] > 0 for step in offline)
