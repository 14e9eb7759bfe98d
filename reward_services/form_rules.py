"""Rules about the form of a text: a pattern, its length, its repetitions. They need no reference.

Scores lie between 0 and 1 and 1 is good; a recipe's weight may be negative.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from reward_services.config import FormRuleName, ScorerConfig

FormRule = Callable[[str, int], float]  # (text, its number of tokens) -> score


def built_form_rule(config: ScorerConfig) -> FormRule:
    """The form that a scorer's settings describe."""
    return _BUILDERS[config.rule](config)  # type: ignore[index]  # the schema has checked it


def _regex(config: ScorerConfig) -> FormRule:
    """1 if the pattern matches somewhere; ^ and \\Z anchor it, (?s) lets a dot match newlines."""
    assert config.pattern is not None
    pattern = re.compile(config.pattern)
    return lambda text, num_tokens: float(pattern.search(text) is not None)


def _length(config: ScorerConfig) -> FormRule:
    """1 from min_length to max_length, and falling linearly to 0 over `length_slack` outside.

    max 100, slack 50: 100 -> 1, 125 -> 0.5, 150 -> 0.
    """
    low, high, slack = config.min_length, config.max_length, config.length_slack

    def rule(text: str, num_tokens: int) -> float:
        size = {"tokens": num_tokens, "words": len(text.split()), "characters": len(text)}
        length = size[config.length_unit]
        excess = max(low - length, 0 if high is None else length - high, 0)
        if excess == 0:
            return 1.0
        return max(0.0, 1.0 - excess / slack) if slack else 0.0

    return rule


def _repetition(config: ScorerConfig) -> FormRule:
    """Distinct n-grams of words over all n-grams: 1 if none comes twice; 1 for a short text too.

    n = 2, "a b a b": (a b), (b a), (a b) -> 2 / 3.
    """

    def rule(text: str, num_tokens: int) -> float:
        words = text.split()
        grams = [tuple(words[i : i + config.ngram]) for i in range(len(words) - config.ngram + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    return rule


_BUILDERS: dict[FormRuleName, Callable[[ScorerConfig], FormRule]] = {
    "regex": _regex,
    "length": _length,
    "repetition": _repetition,
}
