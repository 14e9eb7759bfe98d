"""Small groups with known rewards and lengths, and the toy batch of the hand-worked numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo.objective import LossInputs
from grpo.types import (
    FinishReason,
    Float64,
    Group,
    Origin,
    Prompt,
    Rollout,
    Score,
    Span,
    TrainRow,
)

# Four answers of 3, 2, 4 and 1 tokens; log-probabilities at the start of the step, now, of the
# reference and of the rollout engine.
REWARDS = [1.0, 0.0, 0.0, 1.0]
OLD = [[-0.5, -1.0, -0.2], [-0.7, -0.3], [-1.2, -0.4, -0.9, -0.1], [-0.6]]
NEW = [[-0.4, -1.3, -0.2], [-0.7, -0.1], [-0.8, -0.4, -1.4, -0.1], [-0.6]]
REFERENCE = [[-0.5, -1.1, -0.3], [-0.6, -0.3], [-1.0, -0.5, -1.0, -0.2], [-0.9]]
ENGINE = [[-0.5, -2.2, -0.2], [-0.7, -0.3], [-1.2, -0.4, -0.5, -0.1], [-1.0]]
LENGTHS = [3, 2, 4, 1]


def rollout(
    index: int,
    length: int,
    *,
    guidance: int = 0,
    truncated: bool = False,
    log_probs: Sequence[float] | None = None,
    context: int = 2,
) -> Rollout:
    """A completion of `length` tokens of which the first `guidance` were given."""
    is_guidance = np.arange(length) < guidance
    return Rollout(
        index=index,
        context=np.arange(context, dtype=np.int32),
        tokens=np.arange(length, dtype=np.int32),
        log_probs=np.asarray([-1.0] * length if log_probs is None else log_probs, np.float32),
        origins=np.where(is_guidance, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8),
        versions=np.where(is_guidance, -1, 0).astype(np.int32),
        text="x" * length,
        token_ends=np.arange(1, length + 1, dtype=np.int32),
        finish_reason=FinishReason.LENGTH if truncated else FinishReason.STOP,
    )


def scored(rollouts: Sequence[Rollout], *, group: int = 0, **outcomes: list[float | None]) -> Group:
    """A group with one list of outcomes per scorer."""
    scores = [
        Score(scorer=scorer, span=Span(rollout=place, start=0, end=item.num_tokens), value=value)
        for scorer, values in outcomes.items()
        for place, (item, value) in enumerate(zip(rollouts, values, strict=True))
    ]
    prompt = Prompt(id=f"p{group}", text="?", tokens=np.arange(2, dtype=np.int32))
    return Group(id=group, prompt=prompt, rollouts=tuple(rollouts), scores=tuple(scores))


def toy_group() -> Group:
    """The group of the hand-worked numbers."""
    rollouts = [rollout(i, n, log_probs=ENGINE[i]) for i, n in enumerate(LENGTHS)]
    return scored(rollouts, answer=list(REWARDS))


def random_groups(seed: int, *, num_groups: int, num_generations: int) -> list[Group]:
    """Groups with random lengths (1 to 9), random rewards and some truncated answers."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(num_groups):
        lengths = rng.integers(1, 10, num_generations)
        rollouts = [
            rollout(i, int(n), truncated=bool(rng.random() < 0.2), log_probs=-rng.random(n))
            for i, n in enumerate(lengths)
        ]
        groups.append(scored(rollouts, group=number, answer=list(rng.random(num_generations))))
    return groups


def flat(rows: Sequence[Sequence[float]] | Sequence[Float64]) -> Float64:
    """The rows one after the other, in double precision."""
    return np.concatenate([np.asarray(row, np.float64) for row in rows])


def loss_inputs(
    rows: Sequence[TrainRow],
    *,
    log_probs: Tensor,
    proximal: Float64,
    reference: Float64 | None = None,
    entropy: Tensor | None = None,
) -> LossInputs:
    """What the learner would hand to an objective for these rows, in double precision."""
    lengths = [len(row.tokens) for row in rows]
    return LossInputs(
        log_probs=log_probs,
        proximal_log_probs=torch.tensor(proximal),
        behaviour_log_probs=torch.tensor(flat([row.behaviour_log_probs for row in rows])),
        reference_log_probs=None if reference is None else torch.tensor(reference),
        entropy=entropy,
        advantages=torch.tensor(flat([row.advantages for row in rows])),
        weights=torch.tensor(flat([row.weights for row in rows])),
        policy_weights=torch.tensor(flat([row.policy_weights for row in rows])),
        origins=torch.tensor(flat([row.origins for row in rows])).to(torch.uint8),
        is_cross_context=torch.tensor(
            flat([np.full(len(row.tokens), row.is_cross_context) for row in rows])
        ).bool(),
        row=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        num_rows=len(rows),
    )


def token_inputs(
    *,
    log_probs: Sequence[float] | Tensor,
    proximal: Sequence[float],
    advantages: Sequence[float] | None = None,
    behaviour: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    entropy: Sequence[float] | None = None,
) -> LossInputs:
    """One row of tokens with weight 1 each, in double precision."""

    def doubles(values: Sequence[float] | Tensor) -> Tensor:
        return values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)

    size = len(proximal)
    return LossInputs(
        log_probs=doubles(log_probs),
        proximal_log_probs=doubles(proximal),
        behaviour_log_probs=doubles(proximal if behaviour is None else behaviour),
        reference_log_probs=None if reference is None else doubles(reference),
        entropy=None if entropy is None else doubles(entropy),
        advantages=doubles([1.0] * size if advantages is None else advantages),
        weights=torch.ones(size, dtype=torch.float64),
        policy_weights=torch.ones(size, dtype=torch.float64),
        origins=torch.zeros(size, dtype=torch.uint8),
        is_cross_context=torch.zeros(size, dtype=torch.bool),
        row=torch.zeros(size, dtype=torch.int64),
        num_rows=1,
    )
