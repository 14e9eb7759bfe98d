"""What both engines share around sampling: room for an answer, guidance, and the Rollout record.

Knows tokens and text; nothing of a model or of how tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.errors import BadInput, PromptTooLong
from grpo.types import FinishReason, Float32, Int32, Origin, Rollout, SampleRequest
from rollout_workers.tokenization import Tokenization


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """The tokens that an engine sampled after context and guidance. N tokens."""

    tokens: Sequence[int]  # [N] with the end token, if the model wrote one
    log_probs: Float32 | Sequence[float]  # [N]
    versions: Int32  # [N]
    stopped: bool  # False: the token budget ended it


NOTHING = Sampled(tokens=(), log_probs=(), versions=np.zeros(0, np.int32), stopped=True)


def check_room(request: SampleRequest, max_model_len: int) -> None:
    """Refuse a request whose context and answer together do not fit the model."""
    needed = len(request.context) + request.sampling.max_tokens
    if needed > max_model_len:
        raise PromptTooLong(
            f"context of {len(request.context)} tokens plus a completion of up to "
            f"{request.sampling.max_tokens} needs {needed} tokens, but the engine holds "
            f"{max_model_len}: shorten the prompt or raise sampling.max_prompt_length"
        )
    if len(request.context) == 0:
        raise BadInput("the context is empty: a model needs one token to start from")


def is_complete(request: SampleRequest, stop_ids: Sequence[int]) -> bool:
    """Whether the guidance already ends the completion, so that nothing is left to sample."""
    guidance = request.guidance
    if len(guidance) > 0 and int(guidance[-1]) in stop_ids:
        return True
    if len(guidance) >= request.sampling.max_tokens:
        raise PromptTooLong(
            f"guidance of {len(guidance)} tokens leaves no room in a completion of "
            f"{request.sampling.max_tokens}: shorten it or raise sampling.max_completion_length"
        )
    return False


def rollout(request: SampleRequest, sampled: Sampled, tokenization: Tokenization) -> Rollout:
    """The completion: guidance first, then what was sampled."""
    given = len(request.guidance)
    count = len(sampled.tokens)
    tokens = np.concatenate([request.guidance, np.asarray(sampled.tokens, np.int32)])
    text, token_ends = tokenization.decode(tokens)
    return Rollout(
        index=request.index,
        context=request.context,
        tokens=tokens.astype(np.int32),
        log_probs=np.concatenate([np.zeros(given), sampled.log_probs]).astype(np.float32),
        origins=np.repeat(
            np.array([Origin.GUIDANCE, Origin.POLICY], np.uint8), np.array([given, count])
        ),
        versions=np.concatenate([np.full(given, -1), sampled.versions]).astype(np.int32),
        text=text,
        token_ends=token_ends,
        finish_reason=FinishReason.STOP if sampled.stopped else FinishReason.LENGTH,
    )
