"""A second try with a hint for groups that failed without one (Guide-GRPO, arXiv:2506.13923).

Hinted answers are trained after the plain prompt: they are known by their `train_context`. Refuses
to know how text becomes a prompt and how the learner weighs such tokens. Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.subsets import subset
from grpo.templates import filled
from grpo.types import Dropped, Float64, Group, Origin, Prompt, RolloutPlan

MIN_RATIO_SCALE = 1e-4  # as in the released code


def plain_then_hinted(
    group: Group,
    state: State,
    *,
    num_generations: int,
    scorer: str,
    fails_up_to: float,
    column: str,
    template: str,
) -> tuple[RolloutPlan, ...]:
    """All answers from the plain prompt; if they failed and there is a hint, as many with it.

    Failed: their mean outcome is at most `fails_up_to`. Hinted answers are sampled after prompt
    and hint and trained after the prompt alone.
    """
    if not group.rollouts:
        return (RolloutPlan(),) * num_generations
    hint = hint_of(group.prompt, column)
    is_done = len(group.rollouts) > num_generations
    if is_done or hint is None or not accuracy(group, scorer=scorer) <= fails_up_to:
        return ()
    text = filled(template, {"prompt": group.prompt.text, "hint": hint})
    return (RolloutPlan(text=text, trains_on_prompt=True),) * num_generations


def hint_of(prompt: Prompt, column: str) -> str | None:
    """The hint of the prompt's row; None: it has none, or an empty one."""
    if column not in prompt.columns:
        return None
    value = prompt.columns[column]
    return value if isinstance(value, str) and value.strip() else None


def accuracy(group: Group, *, scorer: str) -> float:
    """The mean outcome of the answers that were judged; NaN without any."""
    values = outcome_values(group, scorer=scorer)
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def hinted_if_any(group: Group, state: State) -> Group:
    """The hinted answers alone where there are some: they take the place of the failed ones."""
    return subset(group, hinted_places(group)) if hinted_places(group) else group


def hinted_places(group: Group) -> list[int]:
    """The answers that were sampled with a hint."""
    return [i for i, rollout in enumerate(group.rollouts) if rollout.train_context is not None]


def drop_if_accuracy_outside(
    group: Group, state: State, *, scorer: str, low: float, high: float
) -> Group | Dropped:
    """Keep a group only if its mean outcome lies within [low, high]: it has right and wrong ones.

    0.001 to 0.999 in the released code. An all-right group teaches nothing, hinted or not.
    """
    value = accuracy(group, scorer=scorer)
    if low <= value <= high:
        return group
    reason = "failed_with_hint" if hinted_places(group) else "failed_without_hint"
    if value > high:
        reason = "all_right"
    detail = f"{scorer}: {outcome_values(group, scorer=scorer).tolist()}"
    return Dropped(group=group.id, prompt=group.prompt.id, reason=reason, detail=detail)


def ratio_scales(group: Group, state: State) -> PerToken:
    """On hinted tokens the `ratio_scale` of the group, which `surrogates.shaped_ratio` expects
    where its gamma is None; elsewhere 1. [T]
    """
    scale = ratio_scale(group)
    return [
        np.full(rollout.num_tokens, 1.0 if rollout.train_context is None else scale)
        for rollout in group.rollouts
    ]


def ratio_scale(group: Group) -> float:
    """The 90th percentile of the ratios of the group's hinted tokens, at least 1e-4; else 1.

    The ratio of a token is its probability after the plain prompt, as measured before the step,
    over that with which it was sampled after the hint. The released code takes the percentile of a
    micro-batch, which depends on how rows are packed. Ratios 0.2, 1, 0.5, 0.25: 0.85.
    """
    ratios = hinted_ratios(group)
    return max(float(np.percentile(ratios, 90)), MIN_RATIO_SCALE) if len(ratios) else 1.0


def hinted_ratios(group: Group) -> Float64:
    """Of each token that the policy wrote with a hint, at the start of the step."""
    ratios = [np.zeros(0)]
    for place in hinted_places(group):
        rollout = group.rollouts[place]
        gaps = rollout.measured["log_probs_now"].astype(np.float64) - rollout.log_probs
        ratios.append(np.exp(gaps[rollout.origins == Origin.POLICY]))
    return np.concatenate(ratios)


def hint_metrics(
    groups: Sequence[RewardedGroup], state: State, *, scorer: str, is_scaled: bool
) -> Mapping[str, float]:
    """How many groups of the step needed a hint and what it brought. No mean of nothing."""
    hinted = [item.group for item in groups if hinted_places(item.group)]
    plain = [item.group for item in groups if not hinted_places(item.group)]
    metrics = {"hints/frac_groups": len(hinted) / len(groups)}
    for name, part in (("hinted", hinted), ("plain", plain)):
        means = [accuracy(hinted_if_any(group, state), scorer=scorer) for group in part]
        present = [mean for mean in means if not np.isnan(mean)]
        if present:
            metrics[f"hints/outcome_{name}"] = float(np.mean(present))
    if hinted and is_scaled:
        ratios = np.concatenate([hinted_ratios(group) for group in hinted])
        metrics["hints/ratio_mean"] = float(ratios.mean())
        metrics["hints/ratio_scale"] = float(np.mean([ratio_scale(group) for group in hinted]))
    return metrics
