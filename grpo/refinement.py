"""Drafts first, then refinements of the best one (iGRPO, arXiv:2602.09000).

Answers to the plain prompt are drafts: scored, one of them shown to the refinements, and never
trained. Refinements answer another prompt, by which they are known. Refuses to know how text
becomes a prompt. Shapes: G rollouts of a group, drafts included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from grpo.pipeline import Advantage, PerToken, RewardedGroup, State
from grpo.rewards import total_outcome
from grpo.templates import filled
from grpo.types import Bool, Float64, Group, RolloutPlan


def draft_then_refine(
    group: Group,
    state: State,
    *,
    num_drafts: int,
    num_generations: int,
    template: str,
    max_draft_chars: int | None,
    weights: Mapping[str, float],
) -> tuple[RolloutPlan, ...]:
    """Drafts from the plain prompt; once all are scored, answers to prompt and best draft.

    arXiv:2602.09000, as notes quote its equations: d = argmax of the reward over the drafts,
    q' = template(q, d). A long draft loses its end. The ratio, the KL term and the group's
    statistics are all conditioned on q'.
    """
    if not group.rollouts:
        return (RolloutPlan(),) * num_drafts
    if len(group.rollouts) > num_drafts:
        return ()
    draft = group.rollouts[best_draft(total_outcome(group, weights=weights))]
    values = {"prompt": group.prompt.text, "draft": draft.text.strip()[:max_draft_chars]}
    return (RolloutPlan(text=filled(template, values)),) * num_generations


def best_draft(rewards: Float64) -> int:
    """The place of the first of the best; without any reward the first. 0, 1, 2, 2: place 2."""
    return int(np.argmax(np.where(np.isnan(rewards), -np.inf, rewards)))


def is_refinement(group: Group) -> Bool:
    """Which answers saw more than the plain prompt. [G]"""
    plain = group.prompt.tokens
    return np.array([not np.array_equal(r.context, plain) for r in group.rollouts], bool)


def among_refinements(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage
) -> list[PerToken]:
    """Another advantage, as if the drafts had no reward: they are in no statistics and get 0."""
    return advantage([_without_draft_rewards(item) for item in groups], state)


def refinements_only(group: Group, state: State) -> list[Bool]:
    """No token of a draft."""
    return [
        np.full(rollout.num_tokens, is_kept)
        for rollout, is_kept in zip(group.rollouts, is_refinement(group), strict=True)
    ]


def refinement_metrics(groups: Sequence[RewardedGroup], state: State) -> Mapping[str, float]:
    """What drafts and refinements earned. No mean of nothing.

    `improvement` is over the draft that was shown; `frac_copied` counts refinements that repeat
    its text.
    """
    found: dict[str, list[float]] = {
        "drafts/reward": [],
        "drafts/best_reward": [],
        "refinements/reward": [],
        "refinements/improvement": [],
        "refinements/frac_copied": [],
    }
    for item in groups:
        is_draft = ~is_refinement(item.group)
        drafts, refined = item.rewards[is_draft], item.rewards[~is_draft]
        texts = np.array([rollout.text.strip() for rollout in item.group.rollouts], object)
        shown = best_draft(drafts)
        found["drafts/reward"] += drafts.tolist()
        found["drafts/best_reward"].append(float(drafts[shown]))
        found["refinements/reward"] += refined.tolist()
        found["refinements/improvement"] += (refined - drafts[shown]).tolist()
        found["refinements/frac_copied"] += [
            text == texts[is_draft][shown] for text in texts[~is_draft]
        ]
    present = {name: np.array(values, np.float64) for name, values in found.items()}
    present = {name: values[~np.isnan(values)] for name, values in present.items()}
    return {name: float(values.mean()) for name, values in present.items() if len(values)}


def _without_draft_rewards(item: RewardedGroup) -> RewardedGroup:
    components = item.components.copy()
    components[~is_refinement(item.group)] = np.nan
    return replace(item, components=components)
