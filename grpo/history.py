"""What became of each prompt the last time, and which prompts to leave out for it (SRPO).

arXiv:2504.14286. The algorithm's state is a record per prompt seen. Refuses to know the data set
and the order of its prompts. Shapes: G rollouts in a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo.pipeline import Advantage, PerToken, RewardedGroup, State
from grpo.rewards import outcome_values
from grpo.types import Prompt, StepReport

RIGHT = 0.5  # an answer with a higher outcome is right


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptHistory:
    """Whether all answers to a prompt were right when it was last trained on, by prompt id."""

    all_right: Mapping[str, bool] = field(default_factory=dict)
    num_steps: int = 0  # optimiser steps made


def solved_last_time(prompt: Prompt, state: State) -> str | None:
    """Skip a prompt whose answers were all right the last time.

    Prompts with wrong answers stay, those without a right one too: they may become solvable. If
    all prompts seen so far were solved, none is skipped. {a: 1111, b: 1011, c: 0000}: skips a.
    """
    known = _of(state).all_right
    is_solved = prompt.id in known and known[prompt.id]
    return "solved_last_time" if is_solved and not all(known.values()) else None


def some_solved_last_time(
    prompt: Prompt, state: State, *, share: float, round_steps: int
) -> str | None:
    """Skip this share of the prompts whose answers were all right the last time (VerIPO).

    Which of them depends on the prompt and on the round, of `round_steps` steps, alone.
    """
    known = _of(state)
    if prompt.id not in known.all_right or not known.all_right[prompt.id]:
        return None
    name = f"{prompt.id}/{known.num_steps // round_steps}".encode()
    drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64
    return "solved_last_time" if drawn < share else None


def other_domain_first(
    prompt: Prompt, state: State, *, domains: Sequence[str], num_steps: int
) -> str | None:
    """Skip prompts of other domains during the first steps."""
    is_early = _of(state).num_steps < num_steps
    return "domain_of_a_later_stage" if is_early and prompt.domain not in domains else None


def remember_solved(
    state: State, groups: Sequence[RewardedGroup], report: StepReport, *, scorer: str
) -> PromptHistory:
    """Note of each prompt of the step whether all answers that were judged are right."""
    before = _of(state)
    now = dict(before.all_right)
    for item in groups:
        values = outcome_values(item.group, scorer=scorer)
        present = values[~np.isnan(values)]
        if len(present):
            now[item.group.prompt.id] = bool((present > RIGHT).all())
    return PromptHistory(all_right=now, num_steps=before.num_steps + 1)


def nothing_if_truncated(
    groups: Sequence[RewardedGroup], state: State, *, advantage: Advantage
) -> list[PerToken]:
    """Another advantage, 0 on answers that the token budget cut off; their rewards still count.

    Rewards 1, 1, 0, 0, the second and the last cut off, sample deviation: 0.866, 0, -0.866, 0.
    """
    return [
        [
            np.zeros_like(value) if rollout.is_truncated else value
            for rollout, value in zip(item.group.rollouts, values, strict=True)
        ]
        for item, values in zip(groups, advantage(groups, state), strict=True)
    ]


def history_metrics(groups: Sequence[RewardedGroup], state: State) -> Mapping[str, float]:
    """How many prompts are known and how many of them are solved."""
    known = _of(state).all_right
    solved = {"history/frac_solved": float(np.mean(list(known.values())))} if known else {}
    return {"history/num_prompts": float(len(known)), **solved}


def _of(state: State) -> PromptHistory:
    assert isinstance(state, PromptHistory)
    return state
