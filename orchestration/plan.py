"""What a recipe would run, in numbers known beforehand. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestration.config import Recipe
from orchestration.data_config import PromptSource
from orchestration.placement import demands


def planned(recipe: Recipe, *, local: bool) -> list[tuple[str, str]]:
    """(what, how much): roles, files, tokens of a step and of the run."""
    return [*_roles(recipe, local), *_work(recipe), *_files(recipe)]


def _roles(recipe: Recipe, local: bool) -> Iterator[tuple[str, str]]:
    if local:
        yield "roles", "all in this process"
    for demand in demands(recipe):
        count = f"{demand.actors} actor{'s' if demand.actors > 1 else ''}"
        size = f"{demand.cpus:g} CPU, {demand.gpus:g} GPU each"
        yield demand.role, ("in this process" if local else f"{count}, {size}")


def _work(recipe: Recipe) -> Iterator[tuple[str, str]]:
    rollouts, sampling = recipe.rollouts_per_step, recipe.sampling
    sampled = rollouts * sampling.max_completion_length
    yield "steps", f"{recipe.steps}, each {recipe.updates_per_step} optimiser update(s)"
    yield (
        "rollouts",
        f"{recipe.num_prompts_per_step} prompts x {recipe.num_generations} = {rollouts} a step; "
        f"up to {recipe.slots} groups under way",
    )
    yield (
        "tokens",
        f"at most {sampled:,} sampled and {rollouts * recipe.max_model_len:,} trained a step; "
        f"{sampled * recipe.steps:,} sampled in all",
    )


def _sets(setting: str, sources: Sequence[PromptSource]) -> Iterator[tuple[str, str]]:
    """Of several also how they are called; `covey check` reads them and says the shares."""
    for source in sources:
        yield setting, source.source if len(sources) == 1 else f"{source.name}: {source.source}"


def _files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model", recipe.model
    yield from _sets("data.train", recipe.data.training_sources)
    measured = recipe.evaluation
    for name, source in _sets("data.evaluation", recipe.data.evaluation_sources):
        yield name, f"{source}: at most {measured.prompts} prompts x {measured.samples}"
    yield "output", f"{recipe.output}/{recipe.name}-YYYYmmdd-HHMMSS"
