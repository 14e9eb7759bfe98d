"""Advantages from scores of steps or tokens: process-supervision GRPO and PRIME.

A score counts at the last token of its span, and for every token before it. A span without a
score (None) counts nowhere. Refuses to know who judged. Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.advantage import standardized_values
from grpo.pipeline import PerToken, RewardedGroup, State
from grpo.rewards import is_constant
from grpo.step_advantage import whitened_over_tokens
from grpo.types import Bool, Float64, Group

SCALE_EPS = 1e-6  # PRIME's, added to the largest return


def process_rewards(group: Group, *, scorer: str) -> tuple[PerToken, list[Bool]]:
    """The scores at the last tokens of their spans, and which tokens have one. G times [T]"""
    values = [np.zeros(rollout.num_tokens) for rollout in group.rollouts]
    present = [np.zeros(rollout.num_tokens, bool) for rollout in group.rollouts]
    for score in group.scores:
        if score.scorer == scorer and score.value is not None and score.span.end > 0:
            values[score.span.rollout][score.span.end - 1] = score.value
            present[score.span.rollout][score.span.end - 1] = True
    return values, present


def returns_to_go(rewards: Float64) -> Float64:
    """The sum of what is still to come, the token itself included. 0.5, 0, 0.2: 0.7, 0.2, 0.2."""
    return np.cumsum(rewards[::-1])[::-1]


def process_standardized(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    scorer: str,
    outcome_coef: float,
    ddof: int,
    eps: float,
) -> list[PerToken]:
    """GRPO with process supervision: (step score - mean) / deviation, summed to the right. [T]

    arXiv:2402.03300 section 4.1.3; mean and deviation are over all steps of all answers of the
    group. Tokens after the last step, and answers without a scored step, have 0. Steps (0.2, 0.8)
    ending at tokens 1, 3 and (0.5, 0.5, 0.1) ending at 0, 2, 4, ddof 0: 0.6447, 0.6447, 1.5311,
    1.5311 and -0.6447, -0.9670, -0.9670, -1.2893, -1.2893. Ours: outcome_coef times the
    standardised reward of the answer is added.
    """
    found = []
    for item in groups:
        steps = _process_standardized(item.group, scorer=scorer, ddof=ddof, eps=eps)
        answers = outcome_coef * standardized_values(item.rewards, ddof=ddof, eps=eps)
        found.append([step + answer for step, answer in zip(steps, answers, strict=True)])
    return found


def _process_standardized(group: Group, *, scorer: str, ddof: int, eps: float) -> PerToken:
    values, present = process_rewards(group, scorer=scorer)
    pooled = np.concatenate([v[mask] for v, mask in zip(values, present, strict=True)])
    scaled = iter(standardized_values(pooled, ddof=ddof, eps=eps).tolist())
    rewards = [np.zeros(len(value)) for value in values]
    for reward, mask in zip(rewards, present, strict=True):
        reward[mask] = [next(scaled) for _ in range(int(mask.sum()))]
    return [returns_to_go(reward) for reward in rewards]


def two_sources(
    groups: Sequence[RewardedGroup],
    state: State,
    *,
    scorer: str,
    process_coef: float,
    normalize: bool,
) -> list[PerToken]:
    """PRIME: returns of process rewards and of the outcome, each against the others, whitened. [T]

    arXiv:2502.01456, as in its code. Process rewards q: q n/(n-1) - sum over answers of the mean
    of q / (n-1); the outcome, at the last token: r n/(n-1) - sum of r / (n-1). Both are summed to
    the right, added and whitened over the tokens of the step. `normalize` first divides q by the
    largest return of the step. q (0.2, -0.1, 0.4) and (-0.3, 0, 0.1), outcomes 1, 0: 0.9713,
    0.6799, 0.9713 and -1.3598, -0.6799, -0.5828.
    """
    process = [process_rewards(item.group, scorer=scorer) for item in groups]
    largest = max(
        (float(np.abs(returns_to_go(q)).max()) for qs, _ in process for q in qs if len(q)),
        default=0.0,
    )
    scale = process_coef / (largest + SCALE_EPS) if normalize else process_coef
    returns = []
    for item, (values, present) in zip(groups, process, strict=True):
        outcome = leave_one_out_outcomes(item.rewards)
        rewards = leave_one_out_process([scale * q for q in values], present)
        returns.append(
            [returns_to_go(q) + value for q, value in zip(rewards, outcome, strict=True)]
        )
    return whitened_over_tokens(groups, returns)


def leave_one_out_process(values: PerToken, present: Sequence[Bool]) -> PerToken:
    """Rewards of tokens against the mean reward of a token of the other answers. G times [T]

    The baseline stands where a reward does. Answers without any are in no baseline; with fewer
    than two others left there is nothing to compare: 0. (0.4, -0.2, 0.8), (-0.6, 0, 0.2): 0.6,
    -0.6, 1.4 and -1.4, -0.2, 0.2.
    """
    means = [float(q[mask].mean()) for q, mask in zip(values, present, strict=True) if mask.any()]
    num = len(means)
    if num < 2:
        return [np.zeros(len(q)) for q in values]
    base = sum(means) / (num - 1)
    return [
        np.where(mask, q * (num / (num - 1)) - base, 0.0)
        for q, mask in zip(values, present, strict=True)
    ]


def leave_one_out_outcomes(rewards: Float64) -> Float64:
    """r n/(n-1) - sum of r / (n-1) of the n answers judged; NaN for the others. [G]

    Equal rewards make exactly 0. 1, 0: 1, -1.
    """
    num = int((~np.isnan(rewards)).sum())
    if is_constant(rewards):
        return np.where(np.isnan(rewards), np.nan, 0.0)
    return rewards * (num / (num - 1)) - float(np.nansum(rewards)) / (num - 1)


def process_metrics(
    groups: Sequence[RewardedGroup], state: State, *, scorer: str
) -> Mapping[str, float]:
    """What the process scorer said, and whether answers it likes are the right ones.

    A negative correlation says that the policy is paid for pleasing the process scorer. Means of
    nothing are absent.
    """
    found = [process_rewards(item.group, scorer=scorer) for item in groups]
    counts = [int(mask.sum()) for _, present in found for mask in present]
    sums = np.array([q.sum() for values, _ in found for q in values], np.float64)
    flat = [q[mask] for pair in found for q, mask in zip(*pair, strict=True)]
    scores = np.concatenate(flat) if flat else np.zeros(0)
    rewards = np.concatenate([item.rewards for item in groups])
    judged = ~np.isnan(rewards) & (np.array(counts) > 0)
    metrics = {
        "process/mean_spans": float(np.mean(counts)),
        "process/frac_unjudged": float(np.mean(np.array(counts) == 0)),
    }
    if len(scores):
        metrics["process/mean_score"] = float(scores.mean())
    if not is_constant(sums[judged]) and not is_constant(rewards[judged]):
        correlation = np.corrcoef(sums[judged], rewards[judged])[0, 1]
        metrics["process/outcome_correlation"] = float(correlation)
    return metrics
