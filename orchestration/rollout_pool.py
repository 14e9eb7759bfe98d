"""The rollout workers as one engine: whichever serves, it holds the weights that were loaded last.

Refuses to know how weights travel and whether a worker is an actor or an object in this process.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.engines import RolloutEngine
from grpo.types import LoadReport, Rollout, SampleRequest, WeightRef
from orchestration.pool import ActorPool
from orchestration.weight_sync import require_same_weights


class RolloutPool:
    """A RolloutEngine over several."""

    def __init__(self, pool: ActorPool[RolloutEngine]) -> None:
        self.pool = pool

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """All rollouts of one call come from one worker, which can share their context."""
        what = f"sampling {len(requests)} rollouts of group {requests[0].group}"
        return await self.pool.run(what, lambda worker: worker.sample(requests))

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        """Load in all workers, and in later ones before they serve; the report of the slowest."""

        async def loaded(worker: RolloutEngine) -> LoadReport:
            report = await worker.load_weights(ref)
            require_same_weights(report, ref)
            return report

        reports = await self.pool.broadcast(f"loading version {ref.version}", loaded)
        return max(reports, key=lambda report: sum(report.timings_s.values()))
