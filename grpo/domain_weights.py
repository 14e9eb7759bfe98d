"""Group distributionally robust weights: domains on which the policy does badly weigh more.

The algorithm's state is one weight per domain seen so far. Refuses to know which data they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.types import Group, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainWeights:
    """q, which sums to 1 over the domains seen so far; empty before the first step."""

    weights: Mapping[str, float]


def domain_weight(group: Group, state: State) -> PerToken:
    """q of the group's domain times the number of domains: 1 on average, and where it is new."""
    weights = _of(state)
    domain = group.prompt.domain
    factor = weights[domain] * len(weights) if domain in weights else 1.0
    return [np.full(rollout.num_tokens, factor) for rollout in group.rollouts]


def domain_metrics(groups: Sequence[RewardedGroup], state: State) -> Mapping[str, float]:
    """The factor of each domain in this step."""
    weights = _of(state)
    return {f"domain_weight/{name}": q * len(weights) for name, q in weights.items()}


def follow_losses(
    state: State, groups: Sequence[RewardedGroup], report: StepReport, *, step_size: float
) -> DomainWeights:
    """Move the weights towards the domains of this step whose mean reward is low.

    The loss of a domain is 1 - mean reward; the surrogate itself is near 0 whatever is learned. A
    domain that was not in the step keeps its weight; a new one starts with the mean of the others.
    """
    rewards: dict[str, list[float]] = {}
    for item in groups:
        present = item.rewards[~np.isnan(item.rewards)]
        if len(present):
            rewards.setdefault(item.group.prompt.domain, []).extend(present.tolist())
    losses = {name: 1.0 - float(np.mean(values)) for name, values in rewards.items()}
    known = dict(_of(state))
    new = {name: 1.0 / max(len(known), 1) for name in losses if name not in known}
    total = sum(known.values()) + sum(new.values())
    start = {name: q / total for name, q in (known | new).items()}
    return DomainWeights(weights=exponentiated(start, losses, step_size=step_size))


def exponentiated(
    weights: Mapping[str, float], losses: Mapping[str, float], *, step_size: float
) -> dict[str, float]:
    """q exp(step_size * loss) of the domains that have a loss, with their sum unchanged.

    arXiv:2405.20304 with C = 0. Weights 0.5 and 0.5, losses 0.3 and 1, step size 1: 0.3318, 0.6682.
    """
    moved = {name: weights[name] * np.exp(step_size * loss) for name, loss in losses.items()}
    scale = sum(weights[name] for name in losses) / max(sum(moved.values()), np.finfo(float).tiny)
    return {**weights, **{name: float(value * scale) for name, value in moved.items()}}


def _of(state: State) -> Mapping[str, float]:
    assert isinstance(state, DomainWeights)
    return state.weights
