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

from grpo.engines import RolloutEngine, Scorer
from grpo.errors import BadInput, Fatal
from grpo.pipeline import Pipeline, State
from grpo.types import Dropped, Group, Prompt, RolloutPlan, SampleRequest, Sampling


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
    """A scorer and what a failure of it means for the group."""

    scorer: Scorer
    stop_on_failure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecipe:
    """All that the groups of a run have in common."""

    pipeline: Pipeline
    sampling: Sampling
    run_seed: int
    engine: RolloutEngine
    scorers: Mapping[str, ScorerRole]


def rollout_seed(run_seed: int, group: int, wave: int, index: int) -> int:
    """The same rollout asks for the same sample after a retry or a resume; 63 bits."""
    name = f"{run_seed}/{group}/{wave}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


async def run_group(
    common: GroupRecipe, group_id: int, prompt: Prompt, state: State
) -> FinishedGroup | DroppedGroup:
    """Bring one group to the point where it can be trained on, or say why it cannot."""
    admitted = generated = time.time()
    group = Group(id=group_id, prompt=prompt)
    outcome: Group | Dropped
    try:
        group = await _sampled(common, group, state)
        generated = time.time()
        group = await _scored(common, group)
        outcome = _failed_score(common, group) or _selected(common.pipeline, group, state)
    except BadInput as error:
        outcome = Dropped(
            group=group_id, prompt=prompt.id, reason=type(error).__name__, detail=str(error)
        )
    times = GroupTimes(admitted=admitted, generated=generated, scored=time.time())
    if isinstance(outcome, Dropped):
        return DroppedGroup(group=group, dropped=outcome, times=times)
    return FinishedGroup(group=outcome, times=times)


async def _sampled(common: GroupRecipe, group: Group, state: State) -> Group:
    wave = 0
    while plans := common.pipeline.plan(group, state):
        requests = _requests(common, group, wave, plans)
        rollouts = await common.engine.sample(requests)
        group = replace(group, rollouts=(*group.rollouts, *rollouts))
        wave += 1
    return group


def _requests(
    common: GroupRecipe, group: Group, wave: int, plans: Sequence[RolloutPlan]
) -> list[SampleRequest]:
    first = len(group.rollouts)
    return [
        SampleRequest(
            group=group.id,
            index=first + offset,
            context=group.prompt.tokens,
            guidance=plan.guidance,
            sampling=common.sampling,
            seed=rollout_seed(common.run_seed, group.id, wave, first + offset),
        )
        for offset, plan in enumerate(plans)
    ]


async def _scored(common: GroupRecipe, group: Group) -> Group:
    """Wave by wave, every scorer of a wave at once; a failed score ends the waves."""
    names = tuple(common.scorers)
    while any((wanted := common.pipeline.spans(group, names)).values()):
        scores = await asyncio.gather(
            *[
                common.scorers[name].scorer.score(group, spans)
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
