"""What is wrong with values of a recipe that are each right alone; with the remedy.

Refuses to know where the values come from and how they are said to people.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo import combinations
from grpo.algorithms.user_file import composition_problems, is_file_name, theirs_is_told
from grpo.errors import UserError
from rollout_workers.adapter_limits import adapter_problems

if TYPE_CHECKING:
    from orchestration.recipe import Recipe

HEALTHY_BFLOAT16_GAP = 1e-2  # mean |difference| measured between vLLM and transformers: 6e-3
HEALTHY_FP8_GAP = 0.05  # with weights, cache or both in fp8: 0.01, 0.02, 0.03 (starter model)


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for each; none: the recipe can work."""
    yield from _step_problems(recipe)
    yield from _sampling_problems(recipe)
    if recipe.alarms.worker_s >= recipe.alarms.stall_s:
        yield (
            f"alarms.worker_s is {recipe.alarms.worker_s:g} and alarms.stall_s is "
            f"{recipe.alarms.stall_s:g}: a worker that hangs must be replaced before the run is "
            "given up; set worker_s to half of stall_s"
        )
    yield from _scorer_problems(recipe)
    if not recipe.scorers:
        return  # what follows would say the same in other words
    yield from _precision_problems(recipe)
    if recipe.learner.published_adapters is not None:
        yield from adapter_problems(recipe.rollout, recipe.learner.published_adapters)
    yield from _transport_problems(recipe)
    yield from _size_problems(recipe)
    yield from _algorithm_problems(recipe)


def _step_problems(recipe: Recipe) -> Iterator[str]:
    """Groups of a step that cannot be shared out."""
    prompts, updates = recipe.num_prompts_per_step, recipe.updates_per_step
    replayed = recipe.replayed_per_step
    if recipe.replay.share > 0 and not 1 <= replayed < prompts:
        yield (
            f"replay.share is {recipe.replay.share:g} of {prompts} groups, which is {replayed} "
            f"of them: expected 1 to {prompts - 1}; change the share or num_prompts_per_step"
        )
    elif replayed and updates > recipe.sampled_per_step:
        yield (
            f"updates_per_step is {updates}, but the first step has no more than its "
            f"{recipe.sampled_per_step} sampled groups: lower updates_per_step or replay.share"
        )
    if prompts % updates:
        yield (
            f"num_prompts_per_step is {prompts} and updates_per_step is {updates}: a step is cut "
            "by whole groups; choose a divisor of num_prompts_per_step"
        )


def _sampling_problems(recipe: Recipe) -> Iterator[str]:
    """Rollouts that teach nothing, or something else."""
    if recipe.sampling.temperature == 0:
        yield (
            "sampling.temperature is 0: all rollouts of a group would be equal and teach nothing; "
            "choose a value above 0, usually 1.0"
        )
    if recipe.sampling.top_p < 1 or recipe.sampling.top_k > 0:
        yield (
            f"sampling.top_p is {recipe.sampling.top_p:g} and sampling.top_k is "
            f"{recipe.sampling.top_k}: a policy that is cut off when it is sampled is not the one "
            "that is trained; set top_p: 1 and top_k: 0, and lower temperature instead"
        )


def _scorer_problems(recipe: Recipe) -> Iterator[str]:
    """None, names that clash, and one that learns from nobody."""
    if not recipe.scorers:
        yield "scorers: found none; expected at least one, for example {name: answer, rule: exact}"
        return
    names = [scorer.name for scorer in recipe.scorers]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"scorers: the name {name!r} is used twice; names must differ, as metrics use them"
    for name in sorted({"rollout", "learner"}.intersection(names)):
        yield f"scorers: {name!r} is another role's name in `covey scale`; choose another one"
    for scorer in recipe.scorers:
        if scorer.learns and scorer.learns_from not in {*names} - {scorer.name}:
            yield (
                f"scorers: {scorer.name!r} learns from {scorer.learns_from!r}; expected another "
                f"scorer of the recipe as its outcome: {', '.join({*names} - {scorer.name})}"
            )


def _algorithm_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the algorithm's points together, and a user's own ones each alone."""
    choice = recipe.algorithm
    try:
        with theirs_is_told(choice.name, "cannot be built"):
            pipeline = choice.algorithm.pipeline(
                choice.settings,
                outcomes=recipe.weights,
                max_completion_length=recipe.sampling.max_completion_length,
            )
            objective = choice.algorithm.objective(choice.settings)
    except (ValueError, UserError) as error:
        yield str(error)
        return
    problems = list(composition_problems(pipeline, objective)) if is_file_name(choice.name) else []
    yield from problems or combinations.combination_problems(
        pipeline,
        objective,
        updates_per_step=recipe.updates_per_step,
        epochs_per_step=recipe.epochs_per_step,
        is_replayed=recipe.replay.share > 0,
    )


def _transport_problems(recipe: Recipe) -> Iterator[str]:
    """Weights that do not pass through the object store stay on one kind of device."""
    rollout, learner, chosen = recipe.rollout, recipe.learner, recipe.rollout.weight_transport
    found = (
        f"rollout.weight_transport is {chosen}, rollout.gpus_per_worker "
        f"{rollout.gpus_per_worker:g} and learner.gpus_per_rank {learner.gpus_per_rank:g}: "
    )
    if chosen == "object_store" or rollout.gpus_per_worker == learner.gpus_per_rank == 0:
        return
    if chosen == "broadcast" and not (rollout.gpus_per_worker and learner.gpus_per_rank):
        yield (
            f"{found}it goes from GPU to GPU or from CPU to CPU; set weight_transport: "
            "object_store, or give GPUs to both"
        )
    elif chosen == "broadcast" and (rollout.has_part_of_gpu or learner.gpus_per_rank < 1):
        yield (
            f"{found}NCCL lets no two processes on one GPU talk; set weight_transport: ipc, or "
            "give whole GPUs to both"
        )
    elif chosen == "ipc" and not (
        recipe.shares_gpus and rollout.gpus_per_worker + learner.gpus_per_rank <= 1
    ):
        yield (
            f"{found}it is for a worker and a learner rank on the same GPU; set parts that fit on "
            "one, such as 0.4 and 0.6, or weight_transport: broadcast"
        )


def _precision_problems(recipe: Recipe) -> Iterator[str]:
    """Two precisions are two policies: their log-probabilities drift apart until training fails."""
    published = recipe.learner.rollout_dtype
    if recipe.rollout.dtype != published:
        yield (
            f"rollout.dtype is {recipe.rollout.dtype}, but the learner publishes {published}: the "
            "sampled and the trained policy would differ; set rollout.dtype to "
            f"{published}, or learner.publish_dtype to {recipe.rollout.dtype}"
        )
    if recipe.rollout.fp8_settings:
        yield from _rounding_problem(recipe)
    elif published == "bfloat16" and recipe.alarms.log_prob_gap < HEALTHY_BFLOAT16_GAP:
        yield (
            f"alarms.log_prob_gap is {recipe.alarms.log_prob_gap:g}, but in bfloat16 a gap up to "
            f"{HEALTHY_BFLOAT16_GAP:g} is healthy: set it to {HEALTHY_BFLOAT16_GAP:g} or more"
        )


def _rounding_problem(recipe: Recipe) -> Iterator[str]:
    """Tokens are sampled by a rounding of the policy: both alarm and loss have to know."""
    if recipe.alarms.log_prob_gap >= HEALTHY_FP8_GAP:
        return
    is_corrected = recipe.algorithm.settings.importance_cap is not None
    correction = (
        ""
        if is_corrected
        else (
            ", and algorithm.importance_cap: 2, which is null now, so that the loss corrects for "
            "it (but for an algorithm that needs no importance weight)"
        )
    )
    yield (
        f"alarms.log_prob_gap is {recipe.alarms.log_prob_gap:g}, but with "
        f"{' and '.join(recipe.rollout.fp8_settings)} tokens are sampled by a rounding of the "
        f"policy, and a gap up to {HEALTHY_FP8_GAP:g} is healthy: set it to {HEALTHY_FP8_GAP:g} or "
        f"more{correction}"
    )


def _size_problems(recipe: Recipe) -> Iterator[str]:
    """Work that cannot be cut into the pieces that the recipe asks for."""
    learner = recipe.learner
    rows = recipe.rollouts_per_step // recipe.updates_per_step
    if rows < learner.row_ranks:
        yield (
            f"learner.ranks is {learner.ranks}, but an update has only {rows} rollouts: "
            "lower learner.ranks or raise num_prompts_per_step"
        )
    if learner.backend == "torch" and learner.zero_stage == 3:
        yield (
            "learner.zero_stage is 3, but learner.backend torch shares nothing out: "
            "set learner.backend: deepspeed, or leave zero_stage out"
        )
    if learner.warmup_steps and learner.warmup_steps >= recipe.steps:
        yield (
            f"learner.warmup_steps is {learner.warmup_steps} and steps is {recipe.steps}: the "
            "learning rate would never be reached; lower warmup_steps"
        )
