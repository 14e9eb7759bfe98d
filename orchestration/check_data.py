"""The data sets of a recipe, every line read, and what a run will make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from grpo.errors import UserError
from grpo.types import Int32
from orchestration.config import Recipe
from orchestration.data_config import PromptSource
from orchestration.mixture import Mixture
from orchestration.prompts import PromptSet, PromptTokenizer, load_prompts
from reward_services.rules import built_rule


def data_checks(
    recipe: Recipe, tokenizer: PromptTokenizer | None, training: list[PromptSet]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """(setting, what reads a set and says what it found); each fills `training` with its set.

    Lines are checked without a tokenizer, too.
    """
    sources = recipe.data.training_sources
    shares = Mixture([source.weight for source in sources]).shares
    for source, share in zip(sources, shares, strict=True):
        yield "data.train", partial(_training, recipe, tokenizer, source, share, training)
    for source in recipe.data.evaluation_sources:
        yield "data.evaluation", partial(_evaluation, recipe, tokenizer, source, training)


def require_domains(named: Sequence[str], training: Sequence[PromptSet]) -> None:
    """UserError if the algorithm's settings name a domain that no training prompt has."""
    found = dict.fromkeys(prompt.domain for loaded in training for prompt in loaded.prompts)
    if missing := [name for name in named if name not in found]:
        shown = [*map(repr, found)][:20]
        raise UserError(
            f"its settings name the domain {', '.join(map(repr, missing))}, which no prompt of "
            f"data.train has; found: {', '.join(shown)}; data.domain_column, or the domain of a "
            "set, says which a prompt has"
        )


def _training(
    recipe: Recipe,
    tokenizer: PromptTokenizer | None,
    source: PromptSource,
    share: float,
    training: list[PromptSet],
) -> str:
    loaded = _loaded(recipe, tokenizer, source)
    facts = _facts(loaded, tokenizer)
    if shared := _num_shared(loaded, training):
        facts.append(f"{shared} of them are in an earlier set too")
    if len(recipe.data.train) > 1:
        facts[0] = f"{source.name}: {facts[0]}"
        facts.append(f"{100 * share:.3g} % of the groups")
    groups = recipe.sampled_per_step * recipe.steps
    facts.append(f"{groups * share / len(loaded.prompts):.3g} epochs in {recipe.steps} steps")
    training.append(loaded)
    _require_references(recipe, source, loaded)
    return ", ".join(facts)


def _evaluation(
    recipe: Recipe,
    tokenizer: PromptTokenizer | None,
    source: PromptSource,
    training: Sequence[PromptSet],
) -> str:
    loaded = _loaded(recipe, tokenizer, source)
    facts = _facts(loaded, tokenizer)
    if shared := _num_shared(loaded, training):
        facts.append(f"{shared} of them are training prompts too")
    if len(recipe.data.evaluation or ()) > 1:
        facts[0] = f"{source.name}: {facts[0]}"
    _require_references(recipe, source, loaded)
    return ", ".join(facts)


def _loaded(recipe: Recipe, tokenizer: PromptTokenizer | None, source: PromptSource) -> PromptSet:
    longest = recipe.sampling.max_prompt_length
    return load_prompts(source, tokenizer or _NoTokenizer(), max_prompt_length=longest)


class _NoTokenizer:
    """Stands in where the model's own cannot be loaded, so that lines are checked all the same."""

    def encode_prompt(self, prompt: object) -> Int32:
        return np.zeros(1, np.int32)

    def encode_text(self, text: str) -> Int32:
        return np.zeros(0, np.int32)


def _facts(loaded: PromptSet, tokenizer: PromptTokenizer | None) -> list[str]:
    facts = [f"{len(loaded.prompts)} prompts"]
    if tokenizer is not None:
        facts.append(f"the longest {max(len(p.tokens) for p in loaded.prompts)} tokens")
    if loaded.num_dropped:
        facts.append(f"{loaded.num_dropped} dropped as too long")
    return facts


def _num_shared(loaded: PromptSet, earlier: Sequence[PromptSet]) -> int:
    seen = {prompt.text for other in earlier for prompt in other.prompts}
    return sum(prompt.text in seen for prompt in loaded.prompts)


def _require_references(recipe: Recipe, source: PromptSource, loaded: PromptSet) -> None:
    """Rules need a reference that they can read in every row."""
    bad: list[str] = []
    for scorer in recipe.scorers:
        if not scorer.needs_reference:
            continue
        rule = built_rule(scorer)
        for prompt in loaded.prompts:
            if prompt.reference is None:
                bad.append(
                    f"{prompt.id}: no answer, which scorer {scorer.name!r} compares with; "
                    f"expected a column {source.answer_column!r} (data.answer_column names it)"
                )
                continue
            try:
                rule("", prompt.reference)
            except ValueError as error:
                bad.append(f"{prompt.id}: {error}")
    if bad:
        more = [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise UserError("\n".join([*bad[:5], *more]))
