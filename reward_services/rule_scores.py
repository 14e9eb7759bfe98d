"""The rules that are computed in place, in microseconds: from a span to its score.

Rules that a hostile text could hold up are not among them; judges.py gives those a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from grpo.types import Group, Score, Span
from reward_services.batches import span_characters, span_text
from reward_services.config import ScorerConfig
from reward_services.form_rules import FormRule, built_form_rule
from reward_services.rules import Rule, built_rule
from reward_services.step_judge import STEP_RULES, StepRule


def score_rule(config: ScorerConfig) -> Callable[[Group, Span], Score] | None:
    """How a rule scores a span in place; None: the scorer needs a judge that can be stopped."""
    if config.rule is None or needs_process(config):
        return None
    if config.needs_reference:
        return partial(_compared, config.name, built_rule(config))
    if config.rule in STEP_RULES:
        return partial(_stepped, config.name, STEP_RULES[config.rule])
    return partial(_formed, config.name, built_form_rule(config))


def needs_process(config: ScorerConfig) -> bool:
    """math-verify and patterns of the user's may take for ever; the other rules cannot."""
    return config.rule == "math" or (config.rule is not None and config.pattern is not None)


def _compared(name: str, rule: Rule, group: Group, span: Span) -> Score:
    prompt = group.prompt
    if prompt.reference is None:
        return _failed(name, span, f"prompt {prompt.id} has no reference answer")
    try:
        value = rule(span_text(group.rollouts[span.rollout], span), prompt.reference)
    except ValueError as error:
        return _failed(name, span, f"prompt {prompt.id}: {error}")
    return Score(scorer=name, span=span, value=value)


def _stepped(name: str, rule: StepRule, group: Group, span: Span) -> Score:
    rollout = group.rollouts[span.rollout]
    start, end = span_characters(rollout, span)
    try:
        value = rule(group.prompt.text, rollout.text, start, end)
    except ValueError as error:
        return _failed(name, span, f"prompt {group.prompt.id}: {error}")
    return Score(scorer=name, span=span, value=value)


def _formed(name: str, rule: FormRule, group: Group, span: Span) -> Score:
    value = rule(span_text(group.rollouts[span.rollout], span), span.end - span.start)
    return Score(scorer=name, span=span, value=value)


def _failed(name: str, span: Span, failure: str) -> Score:
    return Score(scorer=name, span=span, value=None, failure=failure)
