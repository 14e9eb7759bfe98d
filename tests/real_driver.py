"""The real driver over real local roles, for tests of whole steps: no files, no screen."""

from __future__ import annotations

from dataclasses import replace

from grpo.pipeline import Pipeline
from orchestration.config import Recipe
from orchestration.driver import Driver, Journal
from orchestration.group_task import GroupRecipe
from orchestration.progress import Progress, planned_schedule
from orchestration.prompt_order import PromptOrder
from orchestration.roles import Roles
from orchestration.run_inputs import planned_order
from orchestration.waits import Waits
from rollout_workers.tokenization import Tokenization

DEADLINE_S = 120.0


async def nothing(_: object) -> None:
    """In place of evaluations and checkpoints."""


def common_parts(recipe: Recipe, roles: Roles) -> tuple[GroupRecipe, PromptOrder]:
    """What all groups share, and the training prompts in their order."""
    choice, sampling = recipe.algorithm, recipe.sampling
    tokenization = Tokenization(recipe.model)
    common = GroupRecipe(
        pipeline=choice.algorithm.pipeline(
            choice.settings,
            outcomes=recipe.weights,
            max_completion_length=sampling.max_completion_length,
        ),
        sampling=sampling.drawn(),
        run_seed=recipe.seed,
        engine=roles.engine,
        tokenizer=tokenization,
        scorers=roles.scorers,
    )
    return common, planned_order(recipe, tokenization)


def real_driver(
    recipe: Recipe, roles: Roles, journal: Journal, *, pipeline: Pipeline | None = None
) -> Driver:
    """A driver at the beginning of the recipe; `pipeline` instead of its algorithm's own."""
    common, prompts = common_parts(recipe, roles)
    if pipeline is not None:
        common = replace(common, pipeline=pipeline)
    return Driver(
        schedule=replace(
            planned_schedule(recipe),
            checkpoint_every=0,
            evaluate_every=0,
            max_dropped_rate=0.9,
            take_deadline_s=DEADLINE_S,
            train_deadline_s=DEADLINE_S,
            sync_deadline_s=DEADLINE_S,
        ),
        common=common,
        learner=roles.learner,
        prompt_at=prompts.at,
        journal=journal,
        waits=Waits(),
        progress=Progress(algorithm_state=common.pipeline.initial_state),
        evaluate=nothing,
        checkpoint=nothing,
        scorer_metrics=roles.scorer_metrics,
    )
