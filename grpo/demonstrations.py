"""Known solutions among a group's own answers (LUFFY, arXiv:2504.14945).

A demonstration is an answer that begins with given tokens; the policy's own follow its statistics
or share them. Refuses to know how the learner weighs given tokens. Shapes: G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.advantage import every_token
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import is_constant, outcome_values
from grpo.types import Bool, Float64, Group, Int32, Origin, RolloutPlan


def demonstrated(
    group: Group,
    state: State,
    *,
    num_generations: int,
    num_demonstrations: int,
    end_token: int | None,
    max_tokens: int,
) -> tuple[RolloutPlan, ...]:
    """All answers at once; the first `num_demonstrations` of them are the prompt's solution.

    A prompt without a solution, or with one that does not fit into max_tokens, has none: half a
    demonstration would teach to stop half-way.
    """
    if group.rollouts:
        return ()
    tokens = whole_solution(group.prompt.solution_tokens, end_token=end_token)
    fits = 0 < len(tokens) <= max_tokens - (end_token is None)  # the policy ends it: one token
    count = num_demonstrations if fits else 0
    given = (RolloutPlan(guidance=tokens),) * count
    return given + (RolloutPlan(),) * (num_generations - count)


def whole_solution(solution: Int32, *, end_token: int | None) -> Int32:
    """The solution with its end token, once; empty if there is no solution."""
    if end_token is None or not len(solution) or int(solution[-1]) == end_token:
        return solution
    return np.append(solution, np.int32(end_token)).astype(np.int32)


def is_demonstration(group: Group) -> Bool:
    """Which answers hold given tokens. [G]"""
    return np.array([(r.origins == Origin.GUIDANCE).any() for r in group.rollouts], bool)


def centred_on_own(groups: Sequence[RewardedGroup], state: State) -> list[PerToken]:
    """Reward minus the mean over the policy's own answers, on demonstrations too.

    The variant grpo_split of the released code of arXiv:2504.14945. Rewards 1 (demonstration), 0,
    0, 1, 0, 0, 0, 0: 6/7 for right answers, -1/7 for wrong ones.
    """
    return [every_token(item.group, _centred_on_own_values(item)) for item in groups]


def demonstration_metrics(
    groups: Sequence[RewardedGroup], state: State, *, scorer: str
) -> Mapping[str, float]:
    """How many answers were given and how given and own ones fared. No mean of nothing."""
    given = np.concatenate([is_demonstration(item.group) for item in groups])
    values = np.concatenate([outcome_values(item.group, scorer=scorer) for item in groups])
    parts = {
        "outcome_given": values[given & ~np.isnan(values)],
        "outcome_own": values[~given & ~np.isnan(values)],
    }
    means = {f"demonstrations/{name}": float(v.mean()) for name, v in parts.items() if len(v)}
    return means | {"demonstrations/frac_rollouts": float(given.mean())}


def _centred_on_own_values(item: RewardedGroup) -> Float64:
    rewards = item.rewards
    own = rewards[~is_demonstration(item.group) & ~np.isnan(rewards)]
    if is_constant(rewards) or not len(own):
        return np.zeros_like(rewards)
    return np.where(np.isnan(rewards), 0.0, rewards - own.mean())
