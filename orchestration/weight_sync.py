"""Brings a new version of the policy from the learner into every rollout engine, and checks it.

The one place where versions move. The driver passes references on; weights never pass through it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.engines import PolicyLearner, RolloutEngine
from grpo.errors import WeightMismatch
from grpo.types import Origin, Rollout, SampleRequest, TrainRow, WeightRef


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync cost, by phase."""

    ref: WeightRef
    timings_s: dict[str, float]


async def sync_weights(learner: PolicyLearner, engine: RolloutEngine, version: int) -> SyncReport:
    """Publish the learner's weights as `version` and load them in the engine."""
    started = time.monotonic()
    ref = await learner.publish(version)
    published = time.monotonic()
    report = await engine.load_weights(ref)
    loaded = time.monotonic()
    if (report.version, report.checksum) != (ref.version, ref.checksum):
        raise WeightMismatch(
            f"the rollout engine reports version {report.version} with checksum "
            f"{report.checksum:08x}, the learner published version {ref.version} with checksum "
            f"{ref.checksum:08x}: the weights were damaged on the way"
        )
    timings = {"publish": published - started, "load": loaded - published}
    timings |= {f"load/{phase}": seconds for phase, seconds in report.timings_s.items()}
    return SyncReport(ref=ref, timings_s=timings)


async def log_prob_gap(
    learner: PolicyLearner, engine: RolloutEngine, requests: Sequence[SampleRequest]
) -> float:
    """Mean |engine - learner| log-probability of a few fresh tokens of the current version."""
    rollouts = await engine.sample(requests)
    theirs = await learner.log_probs([_row(rollout) for rollout in rollouts])
    gaps = [
        np.abs(rollout.log_probs - np.asarray(values))[_sampled(rollout)]
        for rollout, values in zip(rollouts, theirs, strict=True)
    ]
    return float(np.concatenate(gaps).mean())


def _sampled(rollout: Rollout) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.asarray(rollout.origins == Origin.POLICY)


def _row(rollout: Rollout) -> TrainRow:
    zeros = np.zeros(rollout.num_tokens, np.float32)
    return TrainRow(
        group=0,
        index=rollout.index,
        context=rollout.context,
        tokens=rollout.tokens,
        weights=zeros,
        advantages=zeros,
        policy_weights=zeros,
        behaviour_log_probs=rollout.log_probs,
        versions=rollout.versions,
        origins=rollout.origins,
    )
