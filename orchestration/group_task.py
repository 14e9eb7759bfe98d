"""The life of one group from its prompt to its scores: plan, sample, score, select.

Knows the algorithm's pipeline and the Protocols; refuses to know other groups, the buffer, the
learner and where anything runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.engines import LearningScorer, RolloutEngine, Scorer
from grpo.errors import BadInput, Fatal
from grpo.pipeline import Pipeline, State
from grpo.types import Dropped, Group, Prompt, RolloutPlan, Sampling
from orchestration.rollout_plans import PlanTokenizer, grown, placed, without_sampling
from orchestration.waits import waiting_for


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTimes:
    """When the group passed each station, in seconds of the wall clock."""

    admitted: float
    generated: float
    scored: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedGroup:
    """A group that waits to be trained on."""

    group: Group
    times: GroupTimes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DroppedGroup:
    """A group that will not be trained on, with as much of it as came to be."""

    group: Group
    dropped: Dropped
    times: GroupTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerRole:
    """A scorer, what its failures mean, and what it learns with."""

    scorer: Scorer
    stop_on_failure: bool  # else a failure drops the group
    max_failure_rate: float | None = None  # share of groups it may fail; None: no bound of its own
    learning: LearningScorer | None = None  # where each step's groups change what it says next


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecipe:
    """All that the groups of a run have in common."""

    pipeline: Pipeline
    sampling: Sampling
    run_seed: int
    engine: RolloutEngine
    tokenizer: PlanTokenizer
    scorers: Mapping[str, ScorerRole]


def rollout_seed(run_seed: int, group: int, wave: int, index: int) -> int:
    """The same rollout asks for the same sample after a retry or a resume; 63 bits."""
    name = f"{run_seed}/{group}/{wave}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


async def run_group(
    common: GroupRecipe, group_id: int, prompt: Prompt, state: State
) -> FinishedGroup | DroppedGroup:
    """Bring one group to the point where it can be trained on, or say why it cannot.

    Waves of rollouts until the plan asks for none; the scores come after each wave or after all.
    """
    admitted = generated = time.time()
    pipeline = common.pipeline
    group = Group(id=group_id, prompt=prompt)
    outcome: Group | Dropped | None = _skipped(pipeline, group, state)
    try:
        wave = 0
        while outcome is None and (plans := pipeline.plan(group, state)):
            group = await _sampled(common, group, wave, plans)
            generated = time.time()
            if pipeline.scores_between_waves:
                group = await _scored(common, group)
                outcome = _failed_score(common, group)
            wave += 1
        if outcome is None:
            group = await _scored(common, group)
            outcome = _failed_score(common, group) or _selected(pipeline, group, state)
    except BadInput as error:
        outcome = Dropped(
            group=group_id, prompt=prompt.id, reason=type(error).__name__, detail=str(error)
        )
    times = GroupTimes(admitted=admitted, generated=generated, scored=time.time())
    if isinstance(outcome, Dropped):
        return DroppedGroup(group=group, dropped=outcome, times=times)
    return FinishedGroup(group=outcome, times=times)


def _skipped(pipeline: Pipeline, group: Group, state: State) -> Dropped | None:
    """The first reason to sample nothing for this prompt."""
    for skip in pipeline.skip:
        reason = skip(group.prompt, state)
        if reason is not None:
            return Dropped(group=group.id, prompt=group.prompt.id, reason=reason, is_planned=True)
    return None


async def _sampled(
    common: GroupRecipe, group: Group, wave: int, plans: Sequence[RolloutPlan]
) -> Group:
    """The group with one more wave of rollouts."""
    items = placed(group, plans, common.tokenizer)
    requests = [
        item.request(
            group.id,
            common.sampling,
            rollout_seed(common.run_seed, group.id, wave, item.index),
        )
        for item in items
        if item.is_sampled
    ]
    what = f"rollout workers: {len(requests)} rollouts of group {group.id}, wave {wave}"
    sampled = iter(await waiting_for(what, common.engine.sample(requests)) if requests else ())
    rollouts = [
        next(sampled) if item.is_sampled else without_sampling(item, common.tokenizer)
        for item in items
    ]
    return grown(group, items, rollouts)


async def _scored(common: GroupRecipe, group: Group) -> Group:
    """Wave by wave, every scorer of a wave at once; a failed score ends the waves.

    The spans function asks only for what nobody has scored yet.
    """
    names = tuple(common.scorers)
    while any((wanted := common.pipeline.spans(group, names)).values()):
        scores = await asyncio.gather(
            *[
                waiting_for(
                    f"scorer {name}: {len(spans)} spans of group {group.id}",
                    common.scorers[name].scorer.score(group, spans),
                )
                for name, spans in wanted.items()
                if spans
            ]
        )
        group = replace(group, scores=(*group.scores, *[s for part in scores for s in part]))
        if any(score.failure is not None for score in group.scores):
            break
    return group


def _failed_score(common: GroupRecipe, group: Group) -> Dropped | None:
    """The first failure, as the reason to drop the group; raises where the recipe says stop."""
    for score in group.scores:
        if score.failure is None:
            continue
        where = f"scorer {score.scorer!r}, rollout {score.span.rollout}: {score.failure}"
        if common.scorers[score.scorer].stop_on_failure:
            raise Fatal(f"a score failed and on_failure is 'stop'; {where}")
        return Dropped(group=group.id, prompt=group.prompt.id, reason="failed_score", detail=where)
    return None


def _selected(pipeline: Pipeline, group: Group, state: State) -> Group | Dropped:
    for select in pipeline.select:
        outcome = select(group, state)
        if isinstance(outcome, Dropped):
            return outcome
        group = outcome
    return group
