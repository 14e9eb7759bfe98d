"""From the groups of a step to what the learner sums: the only composer of a pipeline's points.

rewards -> advantage -> trained masks -> token weights -> aggregation -> rows. Advantages see the
whole step; means are taken within each optimiser update. Refuses to know any algorithm.
Shapes: T tokens, G rollouts in a group, K reward terms, P groups in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from grpo.errors import NonFinite
from grpo.pipeline import PerToken, Pipeline, Reward, RewardedGroup, State, TokenWeight
from grpo.rewards import is_constant, outcome_values, weighted_outcome
from grpo.types import Bool, Float64, Group, TrainBatch, TrainRow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workings:
    """Every number on the way from scores to the learner's sum; lists run over the P groups."""

    rewarded: tuple[RewardedGroup, ...]
    advantages: list[PerToken]
    masks: list[list[Bool]]  # which tokens count, in numerator and mean
    policy_weights: list[PerToken]  # multiply the policy term of a token's loss
    means: list[PerToken]  # coefficients of the mean, which sum up within each update
    loss_weights: list[PerToken]  # multiply the whole loss of a token
    weights: list[PerToken]  # means * loss_weights: what the learner sums with
    parts: tuple[slice, ...]  # the groups of each optimiser update


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltBatch:
    """What goes to the learner, and what the driver keeps of it."""

    batch: TrainBatch
    rewarded: tuple[RewardedGroup, ...]  # P
    advantages: tuple[Float64, ...]  # P times [G], mean over each rollout's tokens
    metrics: dict[str, float]


def build_batch(
    pipeline: Pipeline,
    groups: Sequence[Group],
    state: State,
    *,
    step: int,
    version: int,
    num_updates: int,
    num_epochs: int = 1,
) -> BuiltBatch:
    """Turn the groups of one step into `num_updates` optimiser updates of whole groups.

    With `num_epochs` the same updates follow each other so many times. Rows that no loss weighs
    are left out, but for one of an update that would be empty.
    """
    found = workings(pipeline, groups, state, num_updates=num_updates)
    rows = rows_of_groups(found)
    updates = [
        _trained_rows([row for group_rows in rows[part] for row in group_rows])
        for part in found.parts
    ]
    metrics = _metrics(pipeline, found.rewarded, found.masks)
    for own in pipeline.metrics:
        metrics |= own(found.rewarded, state)
    return BuiltBatch(
        batch=TrainBatch(step=step, version=version, updates=tuple(updates) * num_epochs),
        rewarded=found.rewarded,
        advantages=tuple(_means(per_token) for per_token in found.advantages),
        metrics=metrics,
    )


def workings(
    pipeline: Pipeline, groups: Sequence[Group], state: State, *, num_updates: int
) -> Workings:
    """All that the pipeline's points say of these groups, and what they are multiplied to."""
    if not 1 <= num_updates <= len(groups):
        raise ValueError(
            f"cannot cut {len(groups)} groups into {num_updates} updates of whole groups: "
            "updates_per_step must lie between 1 and num_prompts_per_step"
        )
    parts = tuple(_parts(len(groups), num_updates))
    rewarded = tuple(_rewarded(pipeline, group, state) for group in groups)
    masks = [_trained(pipeline, group, state) for group in groups]
    means = [mean for part in parts for mean in pipeline.aggregation(masks[part])]
    loss_weights = [_product(pipeline.loss_weight, group, state) for group in groups]
    return Workings(
        rewarded=rewarded,
        advantages=pipeline.advantage(rewarded, state),
        masks=masks,
        policy_weights=[_product(pipeline.token_weight, group, state) for group in groups],
        means=means,
        loss_weights=loss_weights,
        weights=[
            [a * b for a, b in zip(*pair, strict=True)]
            for pair in zip(means, loss_weights, strict=True)
        ],
        parts=parts,
    )


def rows_of_groups(found: Workings) -> list[list[TrainRow]]:
    """P times [G]: every rollout as the learner would see it, those of no weight included."""
    groups = [item.group for item in found.rewarded]
    streams = zip(groups, found.weights, found.advantages, found.policy_weights, strict=True)
    return [_rows(*stream) for stream in streams]


def plain_rows(group: Group) -> list[TrainRow]:
    """[G] rows of weight 1 and advantage 0: to ask the learner about a group."""
    ones = [np.ones(rollout.num_tokens) for rollout in group.rollouts]
    return _rows(group, ones, [np.zeros_like(one) for one in ones], ones)


def _trained_rows(rows: Sequence[TrainRow]) -> tuple[TrainRow, ...]:
    return tuple(row for row in rows if row.weights.any()) or tuple(rows[:1])


def _rewarded(pipeline: Pipeline, group: Group, state: State) -> RewardedGroup:
    columns = [reward(group, state) for reward in pipeline.rewards]
    components = np.stack(columns, axis=1) if columns else np.zeros((len(group.rollouts), 0))
    if np.isinf(components).any():
        raise NonFinite(
            f"group {group.id} (prompt {group.prompt.id!r}) has an infinite reward: its terms are "
            f"{components.tolist()}; a scorer must return finite numbers or None"
        )
    return RewardedGroup(group=group, components=components)


def _trained(pipeline: Pipeline, group: Group, state: State) -> list[Bool]:
    masks = [np.ones(rollout.num_tokens, bool) for rollout in group.rollouts]
    for trained in pipeline.trained:
        masks = [a & b for a, b in zip(masks, trained(group, state), strict=True)]
    return masks


def _product(token_weights: Sequence[TokenWeight], group: Group, state: State) -> PerToken:
    weights = [np.ones(rollout.num_tokens) for rollout in group.rollouts]
    for token_weight in token_weights:
        weights = [a * b for a, b in zip(weights, token_weight(group, state), strict=True)]
    return weights


def _parts(num_groups: int, num_updates: int) -> list[slice]:
    """Consecutive parts whose sizes differ by one at most."""
    edges = [num_groups * update // num_updates for update in range(num_updates + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _rows(
    group: Group, weights: PerToken, advantages: PerToken, policy_weights: PerToken
) -> list[TrainRow]:
    streams = zip(group.rollouts, weights, advantages, policy_weights, strict=True)
    return [
        TrainRow(
            group=group.id,
            index=rollout.index,
            context=rollout.context if rollout.train_context is None else rollout.train_context,
            tokens=rollout.tokens,
            weights=weight.astype(np.float32),
            advantages=advantage.astype(np.float32),
            policy_weights=policy_weight.astype(np.float32),
            behaviour_log_probs=rollout.log_probs,
            versions=rollout.versions,
            origins=rollout.origins,
            reference_log_probs=rollout.measured.get("reference"),
            is_cross_context=rollout.train_context is not None,
        )
        for rollout, weight, advantage, policy_weight in streams
    ]


def _means(per_token: PerToken) -> Float64:
    return np.array([values.mean() if len(values) else 0.0 for values in per_token], np.float64)


def _metrics(
    pipeline: Pipeline, rewarded: Sequence[RewardedGroup], masks: Sequence[list[Bool]]
) -> dict[str, float]:
    rollouts = [rollout for item in rewarded for rollout in item.group.rollouts]
    lengths = np.array([rollout.num_tokens for rollout in rollouts], np.float64)
    contexts = sum(len(rollout.context) for rollout in rollouts)
    return _reward_metrics(pipeline, rewarded) | {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([r.is_truncated for r in rollouts])),
        "num_tokens": float(lengths.sum() + contexts),
        "frac_rows_trained": float(np.mean([mask.any() for group in masks for mask in group])),
    }


def _reward_metrics(pipeline: Pipeline, rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """A mean of nothing is absent, not 0."""
    totals = [item.rewards for item in rewarded]
    values = {"reward": np.concatenate(totals)}
    for scorer in dict.fromkeys(score.scorer for item in rewarded for score in item.group.scores):
        raw = [outcome_values(item.group, scorer=scorer) for item in rewarded]
        values[f"rewards/{scorer}/mean"] = np.concatenate(raw)
    for column, reward in enumerate(pipeline.rewards):
        if _function(reward) is not weighted_outcome:
            terms = [item.components[:, column] for item in rewarded]
            values[f"rewards/{_function(reward).__name__}/mean"] = np.concatenate(terms)
    present = {name: value[~np.isnan(value)] for name, value in values.items()}
    return {name: float(value.mean()) for name, value in present.items() if len(value)} | {
        "reward_std": float(np.mean([_sample_std(total) for total in totals])),
        "frac_reward_zero_std": float(np.mean([is_constant(total) for total in totals])),
        "frac_reward_missing": float(np.isnan(values["reward"]).mean()),
    }


def _sample_std(rewards: Float64) -> float:
    return 0.0 if is_constant(rewards) else float(np.nanstd(rewards, ddof=1))


def _function(reward: Reward) -> Callable[..., Float64]:
    return reward.func if isinstance(reward, partial) else reward
