"""What a preference model is asked: a rollout by its tokens, and lengths of its prefixes.

All prefixes of a rollout come from one pass over the longest of them. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.types import Int32
from reward_services.asked_rollouts import AskedRollout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixRow:
    """One rollout, or as much of it as is asked about, and the lengths of its prefixes."""

    context: Int32  # [L]
    tokens: Int32  # [T]
    ends: tuple[int, ...]  # tokens of each prefix, 0 (nothing but the prompt) to T


def prefix_row(rollout: AskedRollout) -> PrefixRow:
    """The spans that are prefixes, once each; of [0, 4), [0, 2), [2, 4): ends 4, 2."""
    ends = tuple(dict.fromkeys(end for start, end in rollout.spans if start == 0))
    tokens = rollout.tokens[: max(ends, default=0)]
    return PrefixRow(context=rollout.context, tokens=tokens, ends=ends)
