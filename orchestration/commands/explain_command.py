"""`covey explain`: what an algorithm would do with given groups, number by number."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestration.commands.arguments import not_negative, parsed
from orchestration.commands.output import remark, say

if TYPE_CHECKING:
    from orchestration.chosen_algorithm import Chosen
    from orchestration.explain.explanation import Explanation
    from orchestration.group_schema import BatchInput

SHOWN_TOKENS = 24


def run(arguments: Sequence[str]) -> int:
    """Read the groups, run one step's code on them, and show every intermediate number."""
    options = parsed(_parser(), arguments)

    from grpo.algorithms.user_file import theirs_is_told
    from grpo.errors import UserError
    from orchestration.chosen_algorithm import chosen_algorithm
    from orchestration.explain.composition import composed
    from orchestration.explain.dry_run import number_problem
    from orchestration.explain.explanation import explained
    from orchestration.group_file import Selection, read_batch

    chosen = chosen_algorithm(options.algorithm, options.set)
    wanted = Selection(step=options.step, groups=tuple(options.group) or None)
    batch = _completed(read_batch(options.groups, wanted), chosen, options)
    pipeline, objective, outcomes = composed(chosen, batch)
    try:
        with theirs_is_told(chosen.algorithm.name, "failed on these groups"):
            found = explained(pipeline, objective, batch)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{chosen.algorithm.name} cannot work with these groups "
            f"({type(error).__name__}: {error}); it may need scores, streams or a lineage that "
            "they do not have: `covey describe` shows what it reads"
        ) from error
    if problem := number_problem(found):
        raise UserError(f"{chosen.algorithm.name}: {problem}")
    if options.json:
        say(json.dumps(_record(chosen, outcomes, found), indent=None if options.compact else 1))
    else:
        _show(chosen, outcomes, found, options.tokens)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="covey explain",
        description="What would this algorithm do with these groups? Runs the code of training on "
        "rollouts, log-probs and scores that are given, and shows every number on the way.",
    )
    parser.add_argument("algorithm", metavar="ALGORITHM", help="a name, FILE.py:NAME, or a recipe")
    parser.add_argument(
        "groups",
        metavar="GROUPS",
        help="a JSON or JSON lines file (covey schema group), the folder of a run, or -",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A=B", help="a setting: --set beta=0.1"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--compact", action="store_true", help="with --json: on one line")
    parser.add_argument("--step", type=int, help="of a run: the step of the groups (the last)")
    parser.add_argument(
        "--group", type=int, action="append", default=[], metavar="ID", help="only this group"
    )
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="SCORER=W",
        help="coefficient of a scorer in the reward (1)",
    )
    parser.add_argument("--updates", type=int, metavar="N", help="optimiser updates of the step")
    parser.add_argument(
        "--max-completion-length", type=int, metavar="N", help="token budget of a completion"
    )
    parser.add_argument(
        "--tokens",
        type=not_negative,
        default=SHOWN_TOKENS,
        metavar="N",
        help=f"show at most so many tokens of a rollout ({SHOWN_TOKENS}); 0: none",
    )
    return parser


def _completed(batch: BatchInput, chosen: Chosen, options: argparse.Namespace) -> BatchInput:
    """The batch with what the command line or the recipe says of the step."""
    from pydantic import ValidationError

    from grpo.errors import UserError

    changes: dict[str, object] = {}
    recipe = chosen.recipe
    if recipe is not None:
        changes["weights"] = recipe.weights
        changes["max_completion_length"] = recipe.sampling.max_completion_length
        if len(batch.groups) == recipe.num_prompts_per_step:  # a whole step
            changes["updates_per_step"] = recipe.updates_per_step
    changes = {key: value for key, value in changes.items() if key not in batch.model_fields_set}
    if options.weight:
        changes["weights"] = {**batch.weights, **_weights(options.weight, batch)}
    if options.updates is not None:
        changes["updates_per_step"] = options.updates
    if options.max_completion_length is not None:
        changes["max_completion_length"] = options.max_completion_length
    try:
        return type(batch).model_validate({**dict(batch), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: found {first['input']!r}; {first['msg']}") from None


def _weights(texts: Sequence[str], batch: BatchInput) -> dict[str, float]:
    from grpo.errors import UserError
    from orchestration.group_file import groups_of, scorers_of

    weights = {}
    known = scorers_of(groups_of(batch), batch.weights)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            has = ", ".join(known) or "no scorer"
            raise UserError(f"--weight {text}: no group has a score of {name!r}; they have {has}")
        try:
            weights[name] = float(value)
        except ValueError:
            raise UserError(f"--weight {text}: expected SCORER=NUMBER, as answer=1") from None
    return weights


def _record(chosen: Chosen, outcomes: dict[str, float], found: Explanation) -> dict[str, object]:
    from orchestration.explain.as_json import explanation_json, plain

    algorithm = chosen.algorithm
    head = {
        "algorithm": algorithm.name,
        "settings": chosen.settings.model_dump(mode="json"),
        "weights": outcomes,
    }
    return {**{key: plain(value) for key, value in head.items()}, **explanation_json(found)}


def _show(chosen: Chosen, outcomes: dict[str, float], found: Explanation, max_tokens: int) -> None:
    from orchestration.explain.as_text import a_console, print_explanation

    algorithm = chosen.algorithm
    say(f"{algorithm.title}  ({algorithm.name}{f', {algorithm.paper}' if algorithm.paper else ''})")
    say("scorers: " + ", ".join(f"{name} * {weight:g}" for name, weight in outcomes.items()))
    say("")
    print_explanation(found, console=a_console(), max_tokens=max_tokens)
    if found.found is None:
        remark("no group is kept; the reasons are above")
