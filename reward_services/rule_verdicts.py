"""The rules that are computed in place, in microseconds: from a span to a verdict.

Rules that a hostile text could hold up are not among them; judges.py gives those a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from grpo.types import Group, Span
from reward_services.batches import span_characters, span_text
from reward_services.config import ScorerConfig
from reward_services.form_rules import FormRule, built_form_rule
from reward_services.rules import Rule, built_rule
from reward_services.step_judge import STEP_RULES, StepRule
from reward_services.user_functions import Verdict


def verdict_rule(config: ScorerConfig) -> Callable[[Group, Span], Verdict] | None:
    """How a rule judges a span in place; None: the scorer needs a judge that can be stopped."""
    if config.rule is None or needs_process(config):
        return None
    if config.needs_reference:
        return partial(_compared, built_rule(config))
    if config.rule in STEP_RULES:
        return partial(_stepped, STEP_RULES[config.rule])
    return partial(_formed, built_form_rule(config))


def needs_process(config: ScorerConfig) -> bool:
    """math-verify and patterns of the user's may take for ever; the other rules cannot."""
    return config.rule == "math" or (config.rule is not None and config.pattern is not None)


def _compared(rule: Rule, group: Group, span: Span) -> Verdict:
    reference = group.prompt.reference
    if reference is None:
        return Verdict(value=None, failure=f"prompt {group.prompt.id} has no reference answer")
    try:
        return Verdict(value=rule(span_text(group.rollouts[span.rollout], span), reference))
    except ValueError as error:
        return Verdict(value=None, failure=f"prompt {group.prompt.id}: {error}")


def _stepped(rule: StepRule, group: Group, span: Span) -> Verdict:
    rollout = group.rollouts[span.rollout]
    start, end = span_characters(rollout, span)
    try:
        return Verdict(value=rule(group.prompt.text, rollout.text, start, end))
    except ValueError as error:
        return Verdict(value=None, failure=f"prompt {group.prompt.id}: {error}")


def _formed(rule: FormRule, group: Group, span: Span) -> Verdict:
    return Verdict(value=rule(span_text(group.rollouts[span.rollout], span), span.end - span.start))
