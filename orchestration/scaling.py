"""The sizes of a run's pools: which ones were asked for, and how the pools stand.

RUN/scale.json is what was asked for last, written by any process that sees the folder.
RUN/pools.json is what the process of the run has made of it (live_pools.py); what was asked for
outlives that process, for a resume. Refuses to know how pools grow.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from grpo.errors import UserError
from orchestration.places import PoolSizes
from orchestration.recipe import Recipe
from orchestration.run_directory import write_json

SCALE_FILE = "scale.json"
POOLS_FILE = "pools.json"
ROLLOUT, LEARNER = "rollout", "learner"  # roles; every other one is a scorer's name
LOCAL = "a --local run has one of each role in one process: run it through Ray to scale it"

T = TypeVar("T")
Sizes = Mapping[str, int]  # by role


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """The content of scale.json."""

    id: str
    sizes: Sizes  # of the roles that shall change


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsRecord:
    """The content of pools.json."""

    can_scale: bool  # False: everything is in one process
    request: str | None = None  # id of the one that was heard last
    refusal: str | None = None  # why that is not in force, or no longer
    asked: Mapping[str, int]  # what is in force of all requests so far
    pools: Mapping[str, PoolSizes]  # by role


def sizes_of(recipe: Recipe) -> dict[str, int]:
    """The size of every role."""
    scorers = {scorer.name: scorer.actors for scorer in recipe.scorers}
    return {ROLLOUT: recipe.rollout.workers, **scorers, LEARNER: recipe.learner.ranks}


def at_sizes(recipe: Recipe, sizes: Sizes) -> Recipe:
    """The recipe with the given roles at other sizes; nothing is checked."""
    every = sizes_of(recipe) | dict(sizes)
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update={"workers": every[ROLLOUT]}),
            "learner": recipe.learner.model_copy(update={"ranks": every[LEARNER]}),
            "scorers": tuple(
                scorer.model_copy(update={"actors": every[scorer.name]})
                for scorer in recipe.scorers
            ),
        }
    )


def parsed_sizes(texts: Sequence[str], recipe: Recipe) -> dict[str, int]:
    """`rollout=4`, `judge=2`, ...; UserError for what is no size of a role of the recipe."""
    roles = sizes_of(recipe)
    sizes: dict[str, int] = {}
    for text in texts:
        role, _, number = text.partition("=")
        if role not in roles:
            close = difflib.get_close_matches(role, roles, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"roles: {', '.join(roles)}"
            raise UserError(f"{text}: this run has no role {role!r}; {remedy}")
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise UserError(
                f"{text}: expected a whole number from 1 on, for example {role}={roles[role] + 1}"
            )
        if role in sizes:
            raise UserError(f"{text}: {role} is given twice; remove one")
        sizes[role] = int(number)
    if problem := size_problem(recipe, sizes):
        raise UserError(problem)
    return sizes


def size_problem(recipe: Recipe, sizes: Sizes) -> str | None:
    """Why a recipe cannot have these sizes, whatever the cluster has; None: it can."""
    try:
        Recipe.model_validate(at_sizes(recipe, sizes).model_dump(mode="json"))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        return f"{in_words(sizes)} is refused: {reason}"
    return None


def ask(run: Path, sizes: Sizes) -> ScaleRequest:
    """Write scale.json; what was asked for and nobody has heard so far is asked for once more."""
    pools, earlier = read_pools(run), read_request(run)
    if earlier is not None and (pools is None or pools.request != earlier.id):
        sizes = {**earlier.sizes, **sizes}
    request = ScaleRequest(id=uuid.uuid4().hex, sizes=sizes)
    write_json(run / SCALE_FILE, asdict(request))
    return request


def read_request(run: Path) -> ScaleRequest | None:
    """None where nobody has asked."""
    return _read(run / SCALE_FILE, TypeAdapter(ScaleRequest))


def read_pools(run: Path) -> PoolsRecord | None:
    """None where no run has begun to work, or one of an older version."""
    return _read(run / POOLS_FILE, TypeAdapter(PoolsRecord))


def _read(path: Path, content: TypeAdapter[T]) -> T | None:
    try:
        return content.validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def at_asked_sizes(recipe: Recipe, run: Path, say: Callable[[str], None]) -> Recipe:
    """The recipe of a resumed run at the sizes that it was last asked to have."""
    pools, given = read_pools(run), sizes_of(recipe)
    asked = {} if pools is None else {r: n for r, n in pools.asked.items() if r in given}
    if all(given[role] == size for role, size in asked.items()):
        return recipe
    undo = f"remove {run / POOLS_FILE} to begin with those of the recipe"
    if problem := size_problem(recipe, asked):
        say(f"the sizes last asked for with covey scale are left out: {problem}")
        return recipe
    say(f"sizes as last asked for with covey scale: {in_words(asked)} ({undo})")
    return at_sizes(recipe, asked)


def in_words(sizes: Sizes) -> str:
    """As the command line takes them."""
    return " ".join(f"{role}={size}" for role, size in sizes.items())


def pools_in_words(pools: Mapping[str, PoolSizes]) -> str:
    """`rollout 1 of 4 ready, 3 starting; judge 1 of 1 ready; learner 1 of 1 ready`."""
    return "; ".join(f"{role} {_in_short(sizes)}" for role, sizes in pools.items())


def _in_short(sizes: PoolSizes) -> str:
    parts = [f"{sizes.ready} of {sizes.wanted} ready"]
    parts += [f"{sizes.starting} starting"] if sizes.starting else []
    parts += [f"{sizes.leaving} leaving"] if sizes.leaving else []
    return ", ".join(parts)
