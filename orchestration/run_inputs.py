"""Everything of a run that can be known, and can be wrong, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.errors import UserError
from grpo.pipeline import Pipeline, State
from grpo.types import Prompt
from orchestration.checkpoint import DriverState, decoded_state, read_driver_state
from orchestration.config import Recipe
from orchestration.found_run import recipe_of_run
from orchestration.manifest import find_damage
from orchestration.progress import Progress
from orchestration.prompt_order import PromptOrder, easy_to_hard
from orchestration.prompts import load_prompts
from orchestration.resume import (
    ResumePoint,
    require_same_data,
    require_same_recipe,
    resolve_resume,
)
from rollout_workers.tokenization import Tokenization

# How the learner computes, not what: a checkpoint does not depend on it, and a run that does not
# fit in memory must be able to go on otherwise. Recorded with every batch (batch_files.py).
FREE_OF_LEARNER = frozenset(
    {"ranks", "zero_stage", "backend", "offload", "reference_offload", "sequence_parallel"}
    | {"max_tokens_per_microbatch", "gradient_checkpointing", "attn_implementation"}
    | {"fused_log_probs", "cpus_per_rank", "gpus_per_rank"}
)
FREE_OF_ROLLOUT = frozenset(
    {"workers", "cpus_per_worker", "gpus_per_worker", "max_concurrent_rollouts", "kv_cache_gib"}
    | {"gpu_memory_utilization", "enforce_eager", "weight_transport"}
)
# Sections and settings.
FREE_TO_CHANGE = frozenset(
    {"steps", "checkpoint", "evaluation", "alarms", "simulation", "trackers", "output"}
    | {f"learner.{name}" for name in FREE_OF_LEARNER}
    | {f"rollout.{name}" for name in FREE_OF_ROLLOUT}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """What can be known and can be wrong before anything is started."""

    recipe: Recipe
    pipeline: Pipeline
    tokenization: Tokenization
    prompts: PromptOrder
    held_out: Sequence[Prompt]
    resume: ResumePoint | None
    state: DriverState | None  # None: a new run, or one that begins again

    def progress_at(self, state: DriverState | None) -> Progress:
        """Where the driver stands at a checkpoint; None: at the beginning."""
        if state is None:
            return Progress(algorithm_state=self.pipeline.initial_state)
        return Progress(
            step=state.step,
            version=state.version,
            next_group=state.next_group,
            pending=state.pending,
            algorithm_state=self._algorithm_state(state),
            num_tokens=state.tokens["generated"],
        )

    def _algorithm_state(self, state: DriverState) -> State:
        try:
            return decoded_state(self.pipeline.initial_state, state.algorithm)
        except ValueError as error:
            raise UserError(
                f"the checkpoint of step {state.step} does not fit the algorithm "
                f"{self.recipe.algorithm.name}: {error}. Name another checkpoint of the run, or "
                "use the version of covey that wrote it (see versions.json of the run)"
            ) from error


def read_inputs(recipe: Recipe, resume: str | None) -> RunInputs:
    """Tokenizer, prompts, pipeline and resume point; UserError with what is wrong."""
    point = None if resume is None else resolve_resume(resume, Path(recipe.output))
    if point is not None:
        _require_whole(point.checkpoint)
        # Read as a recipe: a setting that is newer than the run has its default there.
        saved = recipe_of_run(point.run).model_dump(mode="json")
        require_same_recipe(saved, recipe.model_dump(mode="json"), may_change=FREE_TO_CHANGE)
    state = None
    if point is not None and point.checkpoint is not None:
        state = read_driver_state(point.checkpoint)
        _require_same_seed(point.checkpoint, state, recipe)
    if state is not None and state.step > recipe.steps:
        raise UserError(
            f"the run is at step {state.step} and steps is {recipe.steps}: there is nothing left "
            "to train; raise steps to go on"
        )
    choice = recipe.algorithm
    pipeline = choice.algorithm.pipeline(
        choice.settings,
        outcomes=recipe.weights,
        max_completion_length=recipe.sampling.max_completion_length,
    )
    tokenization = Tokenization(recipe.model)
    prompts = planned_order(recipe, tokenization)
    if state is not None:
        require_same_data(state.prompts, prompts.record)
    return RunInputs(
        recipe=recipe,
        pipeline=pipeline,
        tokenization=tokenization,
        prompts=prompts,
        held_out=held_out_prompts(recipe, tokenization),
        resume=point,
        state=state,
    )


def _require_whole(checkpoint: Path | None) -> None:
    damage = None if checkpoint is None else find_damage(checkpoint, checksums=True)
    if damage is not None:
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {damage}. "
            "Name an older one: --resume RUN/checkpoints/step_N"
        )


def _require_same_seed(checkpoint: Path, state: DriverState, recipe: Recipe) -> None:
    if state.seed != recipe.seed:
        raise UserError(
            f"checkpoint {checkpoint} was written under seed {state.seed}, the run has seed "
            f"{recipe.seed}: it is of another run. Name a checkpoint of this one: "
            "--resume RUN/checkpoints/step_N"
        )


def planned_order(recipe: Recipe, tokenization: Tokenization) -> PromptOrder:
    """The prompt of every group that the recipe will ever admit."""
    longest = recipe.sampling.max_prompt_length
    sets = [
        load_prompts(source, tokenization, max_prompt_length=longest)
        for source in recipe.data.training_sources
    ]
    if (order := recipe.data.curriculum) is not None:
        sets = [
            replace(
                found,
                prompts=easy_to_hard(found.prompts, column=order.column, values=order.values),
            )
            for found in sets
        ]
    return PromptOrder(sets, seed=recipe.seed, shuffle=recipe.data.shuffle)


def held_out_prompts(recipe: Recipe, tokenization: Tokenization) -> list[Prompt]:
    """What the policy is measured on: the first prompts of each evaluation set."""
    longest = recipe.sampling.max_prompt_length
    sets = [
        load_prompts(source, tokenization, max_prompt_length=longest)
        for source in recipe.data.evaluation_sources
    ]
    return [prompt for found in sets for prompt in found.prompts[: recipe.evaluation.prompts]]
