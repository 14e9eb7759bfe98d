"""Brings a new version of the policy from the learner into every rollout engine, and checks it.

The one place where versions move. The driver passes references on; weights never pass through it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from grpo.engines import PolicyLearner, RolloutEngine
from grpo.errors import WeightMismatch
from grpo.types import LoadReport, Origin, Rollout, SampleRequest, TrainRow, WeightRef
from orchestration.waits import waiting_for


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync cost, by phase."""

    ref: WeightRef
    timings_s: dict[str, float]


async def sync_weights(learner: PolicyLearner, engine: RolloutEngine, version: int) -> SyncReport:
    """Publish the learner's weights as `version` and load them in the engine."""
    started = time.monotonic()
    ref = await waiting_for(f"learner: publishing version {version}", learner.publish(version))
    published = time.monotonic()
    report = await waiting_for(
        f"rollout workers: loading version {version}", engine.load_weights(ref)
    )
    loaded = time.monotonic()
    require_same_weights(report, ref)
    timings = {"publish": published - started, "load": loaded - published}
    timings |= {f"load/{phase}": seconds for phase, seconds in report.timings_s.items()}
    return SyncReport(ref=ref, timings_s=timings)


def require_same_weights(report: LoadReport, ref: WeightRef) -> None:
    """What an engine has loaded is what the learner has published."""
    if (report.version, report.checksum) != (ref.version, ref.checksum):
        raise WeightMismatch(
            f"the rollout engine reports version {report.version} with checksum "
            f"{report.checksum:016x}, the learner published version {ref.version} with checksum "
            f"{ref.checksum:016x}: the weights were damaged on the way"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Engine against learner in the log-probabilities of tokens that the engine has sampled."""

    mean: float  # |difference|
    max: float
    kl: float  # k3 of KL(engine || learner)
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """Under the names that a step's own comparison has."""
        return {f"log_prob_gap/{name}": float(value) for name, value in asdict(self).items()}


async def agreement(learner: PolicyLearner, rollouts: Sequence[Rollout]) -> Agreement:
    """Ask the learner about rollouts of its own version; at least one token must be sampled."""
    rows = [_row(rollout) for rollout in rollouts]
    theirs = await waiting_for(
        f"learner: log-probabilities of {len(rows)} rollouts", learner.log_probs(rows)
    )
    pairs = [
        (np.asarray(values, np.float64) - rollout.log_probs)[_sampled(rollout)]
        for rollout, values in zip(rollouts, theirs, strict=True)
    ]
    differences = np.concatenate(pairs)
    return Agreement(
        mean=float(np.abs(differences).mean()),
        max=float(np.abs(differences).max()),
        kl=float((np.expm1(differences) - differences).mean()),
        num_tokens=len(differences),
    )


async def fresh_agreement(
    learner: PolicyLearner, engine: RolloutEngine, requests: Sequence[SampleRequest]
) -> Agreement:
    """The same of a few fresh tokens of the current version."""
    what = f"rollout workers: {len(requests)} rollouts to compare log-probabilities on"
    return await agreement(learner, await waiting_for(what, engine.sample(requests)))


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
