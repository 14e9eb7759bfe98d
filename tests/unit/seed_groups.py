"""Groups with chosen tokens, texts and guidance for the tests of the seed algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo.batch import workings
from grpo.pipeline import PerToken, Pipeline, State
from grpo.types import FinishReason, Float64, Group, Origin, Prompt, Rollout
from tests.unit.grpo_groups import scored


def a_rollout(
    index: int,
    tokens: Sequence[int],
    *,
    guidance: int = 0,
    text: str | None = None,
    truncated: bool = False,
) -> Rollout:
    """These tokens, the first `guidance` of them given; each token is one character of the text.

    A text that is one character short of the tokens leaves the last token, the end, without any.
    """
    is_guidance = np.arange(len(tokens)) < guidance
    text = "x" * len(tokens) if text is None else text
    return Rollout(
        index=index,
        context=np.arange(2, dtype=np.int32),
        tokens=np.array(tokens, np.int32),
        log_probs=np.where(is_guidance, 0.0, -1.0).astype(np.float32),
        origins=np.where(is_guidance, Origin.GUIDANCE, Origin.POLICY).astype(np.uint8),
        versions=np.where(is_guidance, -1, 0).astype(np.int32),
        text=text,
        token_ends=np.minimum(np.arange(1, len(tokens) + 1), len(text)).astype(np.int32),
        finish_reason=FinishReason.LENGTH if truncated else FinishReason.STOP,
    )


def a_text_rollout(index: int, text: str, *, truncated: bool = False) -> Rollout:
    """One token a character, and an end-of-sequence token unless it was cut off."""
    tokens = [ord(character) for character in text] + ([] if truncated else [0])
    return a_rollout(index, tokens, text=text, truncated=truncated)


def token_group(
    rows: Sequence[Sequence[int]], rewards: Sequence[float], *, guidance: Sequence[int] = ()
) -> Group:
    """A group of these completions with these answers' rewards."""
    given = guidance or [0] * len(rows)
    pairs = zip(rows, given, strict=True)
    rollouts = [a_rollout(i, row, guidance=count) for i, (row, count) in enumerate(pairs)]
    return scored(rollouts, answer=list(rewards))


def with_prompt(group: Group, **changes: object) -> Group:
    prompt = Prompt(id=group.prompt.id, text="?", tokens=group.prompt.tokens)
    return replace(group, prompt=replace(prompt, **changes))


def streams(
    pipeline: Pipeline, group: Group, state: State = None
) -> tuple[Float64, Float64, PerToken]:
    """Advantages, loss weights (means and scales multiplied) and per-token coefficients, in double
    precision, as `build_batch` combines them."""
    found = workings(pipeline, [group], state, num_updates=1)
    advantages, weights = found.advantages[0], found.weights[0]
    terms = [weight * a for weight, a in zip(weights, advantages, strict=True)]
    return advantages, weights, terms
