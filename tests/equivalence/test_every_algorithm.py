"""Every algorithm from its own recipe: two real steps on CPU in this process, and what must not
change their result.

The driver, the starter model, the transformers engine, the recipe's own scorers and the plain
torch learner. The groups of the first step then go through the same halves again, in another
order, in other micro-batches, without a difference between their scores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.algorithms import ALGORITHMS
from grpo.batch import build_batch
from grpo.objective import Objective
from grpo.pipeline import Pipeline, State
from grpo.subsets import subset
from grpo.types import Dropped, Group, TrainBatch, TrainRow
from learner.config import LearnerConfig
from learner.rank import LearnerRank
from orchestration import preference_phase
from orchestration.checkpoint import decoded_state, encoded_state
from orchestration.config import Recipe, load_recipe
from orchestration.driver import TrainedStep
from orchestration.roles import local_recipe, started_roles
from orchestration.starter.data import WrittenDatasets, write_datasets
from orchestration.waits import Waits
from tests.fakes import FakeJournal
from tests.real_driver import real_driver
from tests.unit.family_cases import loss_and_gradient, row_inputs

ROOT = Path(__file__).parents[2]
STEPS, GROUPS = 2, 4

# Where equal scores still teach something, and why.
TEACHES_FROM_EQUAL_SCORES = {
    "s_grpo": "of right answers the earlier exit earns more",
    "raft": "right answers are imitated, whatever the others are",
    "raft_pp": "right answers are imitated, whatever the others are",
    "grpo_care": "right answers that are consistent get a bonus",
    "ws_grpo": "the number of steps outside of a range costs, however the steps were judged",
    "dapo": "an answer that nears the limit of length costs",
    "high_entropy": "an answer that nears the limit of length costs, as in dapo",
    "gdpo": "its second reward is the length",
    "rebel": "its reward has the KL term of each answer in it",
    "unlikeliness": "of right answers the unlikely one earns more",
}
BREAKS_TIES_BY_PLACE = {
    "gfpo": "of answers of equal length, the first ones are kept",
    "high_entropy": "of tokens of equal entropy, the first ones make the share full",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """What is left of two steps: the recipe, both halves and the groups of the first step."""

    recipe: Recipe
    pipeline: Pipeline
    objective: Objective
    groups: tuple[Group, ...]
    steps: tuple[TrainedStep, ...]
    state: State

    def rows(self, groups: Sequence[Group]) -> tuple[TrainRow, ...]:
        return self.batch(groups).updates[0]

    def batch(self, groups: Sequence[Group]) -> TrainBatch:
        state = self.pipeline.initial_state
        return build_batch(self.pipeline, groups, state, step=1, version=0, num_updates=1).batch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> WrittenDatasets:
    return write_datasets(tmp_path_factory.mktemp("data"), num_train=60, num_heldout=10)


@pytest.fixture(scope="session")
def preference(data: WrittenDatasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small preference model, for the recipes whose scorer is one."""
    folder = tmp_path_factory.mktemp("preference")
    recipe = shipped("ws_grpo", data, preference=folder)
    scorer = recipe.scorers[1]
    assert scorer.preference is not None
    small = scorer.preference.model_copy(update={"num_questions": 20, "validation_share": 0.3})
    scorers = (recipe.scorers[0], scorer.model_copy(update={"preference": small}))
    parts = preference_phase.preference_parts(recipe.model_copy(update={"scorers": scorers}))
    preference_phase.collect(parts, lambda _: None)
    preference_phase.train(parts, lambda _: None)
    return folder


def shipped(name: str, data: WrittenDatasets, *, preference: Path) -> Recipe:
    overrides = [
        f"steps={STEPS}",
        f"num_prompts_per_step={GROUPS}",
        f"data.train={data.train}",
        "data.evaluation=null",
        "learner.learning_rate=1e-3",
        "learner.warmup_steps=0",
        "max_staleness=0",
    ]
    if name.startswith("ws_grpo"):
        overrides.append(f"scorers.1.preference.folder={preference}")
    return local_recipe(load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides))


async def driven(recipe: Recipe) -> Trained:
    journal = FakeJournal()
    async with started_roles(recipe, local=True, waits=Waits(), on_phase=lambda _: None) as roles:
        driver = real_driver(recipe, roles, journal)
        assert await driver.run()
    choice = recipe.algorithm
    return Trained(
        recipe=recipe,
        pipeline=choice.algorithm.pipeline(
            choice.settings,
            outcomes=recipe.weights,
            max_completion_length=recipe.sampling.max_completion_length,
        ),
        objective=choice.algorithm.objective(choice.settings),
        groups=tuple(item.group for item in journal.steps[0].built.rewarded),
        steps=tuple(journal.steps),
        state=driver.progress.algorithm_state,
    )


@pytest.fixture(scope="module", params=sorted(ALGORITHMS))
def trained(request: pytest.FixtureRequest, data: WrittenDatasets, preference: Path) -> Trained:
    return asyncio.run(driven(shipped(request.param, data, preference=preference)))


def test_two_real_steps(trained: Trained) -> None:
    assert len(trained.steps) == STEPS
    for step in trained.steps:
        assert np.isfinite(list(step.metrics.values())).all()
        assert step.metrics["log_prob_gap"] < 1e-4
    norms = [
        value
        for step in trained.steps
        for name, value in step.metrics.items()
        if name.endswith("grad_norm")  # a stage has one of its own
    ]
    assert max(norms) > 0


def test_its_state_survives_a_checkpoint(trained: Trained) -> None:
    initial = trained.pipeline.initial_state
    assert decoded_state(initial, encoded_state(trained.state)) == trained.state


def numbers(rows: Sequence[TrainRow]) -> dict[tuple[object, ...], np.ndarray]:
    """What the rows of equal tokens bring to the loss, smallest first: twins have no order.

    An update that trains nothing has a row all the same, whichever comes first.
    """
    found: dict[tuple[object, ...], list[list[float]]] = {}
    for row in rows:
        if not row.weights.any():
            continue
        place = (row.group, row.context.tobytes(), row.tokens.tobytes())
        streams = (row.weights, row.advantages * row.policy_weights)
        found.setdefault(place, []).append(np.concatenate(streams).tolist())
    return {place: np.array(sorted(values)) for place, values in found.items()}


def test_the_order_of_the_rollouts_changes_nothing(trained: Trained) -> None:
    if trained.recipe.algorithm.name in BREAKS_TIES_BY_PLACE:
        pytest.skip(BREAKS_TIES_BY_PLACE[trained.recipe.algorithm.name])
    rng = np.random.default_rng(0)
    turned = [
        subset(group, tuple(rng.permutation(len(group.rollouts)).tolist()))
        for group in trained.groups
    ]
    ours, theirs = (numbers(trained.rows(groups)) for groups in (trained.groups, turned))
    assert ours.keys() == theirs.keys()
    for place, values in ours.items():
        np.testing.assert_allclose(values, theirs[place], rtol=1e-5, atol=1e-6)


def learner_of(recipe: Recipe, max_tokens: int) -> LearnerRank:
    config = LearnerConfig(backend="torch", learning_rate=0.0, max_tokens_per_microbatch=max_tokens)
    learner = LearnerRank(
        model=recipe.model,
        config=config,
        algorithm=recipe.algorithm.model_dump(mode="json"),
        total_steps=1,
        temperature=recipe.sampling.temperature,
        rank=0,
        world_size=1,
        master="127.0.0.1:0",
        seed=0,
    )
    learner.start()
    return learner


def test_packing_and_micro_batches_change_nothing(trained: Trained) -> None:
    batch = trained.batch(trained.groups)
    found = []
    for max_tokens in (1, 150, 100_000):  # a row at a time, a few, all at once
        learner = learner_of(trained.recipe, max_tokens)
        found.append(learner.train(batch).metrics)
        learner.close()
    for other in found[1:]:
        for name in ("loss", "grad_norm", "policy_loss"):
            assert other[name] == pytest.approx(found[0][name], rel=2e-4, abs=2e-6), name


def with_equal_scores(group: Group, value: float) -> Group:
    scores = [s if s.value is None else replace(s, value=value) for s in group.scores]
    return replace(group, scores=tuple(scores))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_teach_nothing(trained: Trained, value: float) -> None:
    name = trained.recipe.algorithm.name
    groups = [with_equal_scores(group, value) for group in trained.groups]
    rows = trained.rows(groups)
    advantages = np.concatenate([row.advantages * (row.weights != 0) for row in rows])
    assert np.isfinite(advantages).all()
    if name in TEACHES_FROM_EQUAL_SCORES:
        return
    assert not advantages.any()
    plain = replace(trained.objective, penalties=())
    loss, gradient = loss_and_gradient(plain, row_inputs(plain, rows))
    assert loss == 0 and not gradient.any()


def test_scores_that_are_missing_make_no_number(trained: Trained) -> None:
    """Groups without any score are dropped, or their rows teach nothing; never a NaN."""
    for group in trained.groups:
        bare = replace(group, scores=tuple(replace(s, value=None) for s in group.scores))
        outcome: Group | Dropped = bare
        for select in trained.pipeline.select:
            outcome = select(outcome, trained.pipeline.initial_state)
            if isinstance(outcome, Dropped):
                break
        if isinstance(outcome, Group):
            for row in trained.rows([outcome]):
                assert np.isfinite(row.weights).all()
                assert not row.advantages[row.weights != 0].any()


def test_no_gradient_flows_through_weights(trained: Trained) -> None:
    """Gates and weights are numbers: held fixed, they leave the gradient as it is."""
    rows = trained.rows(trained.groups)
    objective = replace(trained.objective, penalties=())
    inputs = row_inputs(objective, rows, spread=0.05)
    gates = torch.ones_like(inputs.log_probs)
    for gate in objective.gates:
        gates = gates * gate(inputs).detach()
    fixed = replace(inputs, policy_weights=inputs.policy_weights * gates)
    ours = loss_and_gradient(objective, inputs)
    theirs = loss_and_gradient(replace(objective, gates=()), fixed)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)
