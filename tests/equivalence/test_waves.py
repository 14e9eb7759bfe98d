"""Waves of rollouts through the real driver, engine and learner: they agree on every token.

A rollout that was cut into waves is one rollout to the learner: the log-probabilities that the
engine reported for its pieces are those that the learner finds for the whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo.pipeline import Pipeline
from grpo.types import Group, Origin, Prefix, RolloutPlan
from orchestration.config import Recipe
from orchestration.group_task import FinishedGroup, run_group
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import write_datasets
from orchestration.waits import Waits
from rollout_workers.tokenization import Tokenization
from tests.fakes import FakeJournal
from tests.real_driver import common_parts, real_driver

MODEL = Path(__file__).parents[2] / "orchestration" / "starter" / "model"
SUFFIX = "\nanswer: "


def a_recipe(folder: Path, **changes: object) -> Recipe:
    data = write_datasets(folder / "data", num_train=60, num_heldout=10)
    return local_recipe(
        Recipe.model_validate(
            {
                "name": "waves",
                "seed": 3,
                "model": str(MODEL),
                "steps": 2,
                "num_prompts_per_step": 3,
                "sampling": {"max_completion_length": 64, "max_prompt_length": 80},
                "data": {"train": str(data.train)},
                "algorithm": {"name": "grpo", "num_generations": 4},
                "scorers": [{"name": "answer", "rule": "numeric"}],
                "learner": {"learning_rate": 1e-3},
                **changes,
            }
        )
    )


def in_three_waves(group: Group, state: object) -> tuple[RolloutPlan, ...]:
    """Short beginnings; then each goes on where it is, is told to answer, or tries another text."""
    if not group.rollouts:
        return (RolloutPlan(max_new_tokens=4),) * 3
    if len(group.rollouts) > 3:
        return ()
    assert None not in group.outcomes("answer"), "the plan sees the scores of the wave before"
    return (
        RolloutPlan(continues=Prefix(rollout=0, end=group.rollouts[0].num_tokens), replaces=True),
        RolloutPlan(continues=Prefix(rollout=1, end=2), suffix=SUFFIX),
        RolloutPlan(text=f"{group.prompt.text} + 0", trains_on_prompt=True),
        RolloutPlan(text=group.prompt.text),
    )


def waves_of(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, plan=in_three_waves, scores_between_waves=True)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> FakeJournal:
    recipe = a_recipe(tmp_path_factory.mktemp("waves"))

    async def driven() -> FakeJournal:
        journal = FakeJournal()
        async with started_roles(
            recipe, local=True, waits=Waits(), on_phase=lambda name: None
        ) as roles:
            pipeline = waves_of(common_parts(recipe, roles)[0].pipeline)
            assert await real_driver(recipe, roles, journal, pipeline=pipeline).run()
        return journal

    return asyncio.run(driven())


def groups_of(journal: FakeJournal) -> list[Group]:
    return [done.group for step in journal.steps for done in step.groups]


def test_engine_and_learner_agree_on_rollouts_that_were_sampled_in_pieces(
    journal: FakeJournal,
) -> None:
    for step in journal.steps:
        assert step.metrics["log_prob_gap/num_tokens"] > 50
        assert step.metrics["log_prob_gap/max"] < 1e-4


def test_every_answer_is_scored_as_it_stands_at_the_end(journal: FakeJournal) -> None:
    for group in groups_of(journal):
        assert len(group.rollouts) == 6
        assert None not in group.outcomes("answer")
        assert [rollout.index for rollout in group.rollouts] == list(range(6))


def test_the_pieces_are_what_was_asked_for(journal: FakeJournal) -> None:
    tokenization = Tokenization(str(MODEL))
    suffix = tokenization.encode_text(SUFFIX).tolist()
    for group in groups_of(journal):
        onward, cut, _, told, hinted, plain = group.rollouts
        assert cut.num_tokens <= 4
        assert onward.num_tokens >= 4 or not onward.is_truncated
        assert told.tokens[2 : 2 + len(suffix)].tolist() == suffix
        assert (told.origins == Origin.GUIDANCE).sum() == len(suffix)
        assert told.tokens[:2].tolist() == cut.tokens[:2].tolist()
        assert np.array_equal(told.log_probs[:2], cut.log_probs[:2])
        assert [piece.id for piece in told.lineage][:1] == [piece.id for piece in cut.lineage]
        assert plain.context.tolist() == group.prompt.tokens.tolist()
        assert (
            hinted.context.tolist()
            == tokenization.encode_prompt(f"{group.prompt.text} + 0").tolist()
        )
        assert hinted.train_context is not None
        assert hinted.train_context.tolist() == group.prompt.tokens.tolist()
        for rollout in group.rollouts:
            assert rollout.text == tokenization.decode(rollout.tokens)[0]


def test_a_greedy_rollout_in_waves_is_the_one_sampled_at_once(tmp_path: Path) -> None:
    """At temperature 0 where a rollout was cut must not matter to a single token."""
    recipe = a_recipe(tmp_path)

    def in_pieces(group: Group, state: object) -> tuple[RolloutPlan, ...]:
        if not group.rollouts:
            return (RolloutPlan(), RolloutPlan(max_new_tokens=3))
        going_on = group.rollouts[1]
        if not going_on.is_truncated or going_on.num_tokens >= 64:
            return ()
        prefix = Prefix(rollout=1, end=going_on.num_tokens)
        return (RolloutPlan(continues=prefix, replaces=True, max_new_tokens=3),)

    async def sampled() -> Group:
        async with started_roles(
            recipe, local=True, waits=Waits(), on_phase=lambda name: None
        ) as roles:
            common, prompts = common_parts(recipe, roles)
            common = replace(
                common,
                pipeline=replace(common.pipeline, plan=in_pieces, select=()),
                sampling=replace(common.sampling, temperature=0.0),
            )
            done = await run_group(common, 0, prompts.at(0), None)
            assert isinstance(done, FinishedGroup)
            return done.group

    whole, pieces = asyncio.run(sampled()).rollouts
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_allclose(pieces.log_probs, whole.log_probs, atol=1e-5)
    assert len(pieces.lineage) == -(-whole.num_tokens // 3)
    assert pieces.finish_reason is whole.finish_reason
