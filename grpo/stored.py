"""Answers that exist already, with what was said of them, in place of sampled ones.

They come with the prompt. Refuses to know the file that they were read from.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grpo.errors import BadInput
from grpo.pipeline import Spans, State
from grpo.types import Group, RolloutPlan, Span


def stored_answers(group: Group, state: State) -> tuple[RolloutPlan, ...]:
    """Every answer stored with the prompt, its log-probs and its scores; nothing is sampled."""
    if group.rollouts:
        return ()
    stored = group.prompt.stored
    if stored is None:
        raise BadInput(
            f"prompt {group.prompt.id!r} has no stored answers: set offline: false, or name a file "
            "of groups under data.train (`covey schema group` describes it)"
        )
    return tuple(
        RolloutPlan(
            guidance=rollout.tokens,
            guidance_log_probs=rollout.log_probs.astype(np.float32),
            scores=tuple(score for score in stored.scores if score.span.rollout == place),
            max_new_tokens=0,
        )
        for place, rollout in enumerate(stored.rollouts)
    )


def unjudged_only(
    group: Group, scorers: tuple[str, ...], *, spans: Spans
) -> Mapping[str, tuple[Span, ...]]:
    """Other spans, without those of answers of which the scorer has said something already.

    Stored steps may be cut otherwise than ours; half of each would make no sense.
    """
    judged = {(score.scorer, score.span.rollout) for score in group.scores}
    return {
        scorer: tuple(span for span in wanted if (scorer, span.rollout) not in judged)
        for scorer, wanted in spans(group, scorers).items()
    }
