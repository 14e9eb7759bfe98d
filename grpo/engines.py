"""The Protocols between the driver and what it drives: what they can do, never how or where.

Every Protocol has a real implementation (vLLM, model-backed or rule scorers, DeepSpeed) and a
small one in this process, so that the same driver runs with and without a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from grpo.types import (
    Float32,
    Group,
    LoadReport,
    MeasureRequest,
    Rollout,
    SampleRequest,
    Score,
    Span,
    StepReport,
    TrainBatch,
    TrainRow,
    WeightRef,
)


class RolloutEngine(Protocol):
    """Generates completions with the weights it loaded last."""

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """One rollout per request, in order; may be called again before the last call ended."""
        ...

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        """Swap the weights; tokens sampled from now on carry the new version."""
        ...


class Scorer(Protocol):
    """Judges whole answers, prefixes or steps of one group."""

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        """One score per span, in order."""
        ...


class PolicyLearner(Protocol):
    """Holds the policy, its optimiser and the reference policy."""

    async def train(self, batch: TrainBatch) -> StepReport:
        """Apply every update of the batch."""
        ...

    async def log_probs(self, rows: Sequence[TrainRow]) -> list[list[float]]:
        """[T] log-probabilities of each row's completion under the current policy."""
        ...

    async def publish(self, version: int) -> WeightRef:
        """Make the current weights fetchable under this version."""
        ...


class Measuring(Protocol):
    """A learner that answers an algorithm's questions about groups before they are trained on."""

    async def measure(self, request: MeasureRequest) -> Mapping[str, list[list[Float32]]]:
        """By name, for each group, for each of its rows: [T] under the current weights."""
        ...


class LearningScorer(Protocol):
    """A scorer whose own model is trained on the groups of each step."""

    async def learn(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Train on groups that are scored already; the metrics of that."""
        ...

    async def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on as if never stopped."""
        ...

    async def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        ...


class Checkpointed(Protocol):
    """What is small enough to be written while the run waits."""

    async def save(self, folder: Path) -> None:
        """Write all that `load` needs below `folder`."""
        ...

    async def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        ...


class SavedAside(Protocol):
    """A learner whose state is copied first, and written while it goes on training."""

    async def snapshot(self) -> None:
        """Copy the training state; whatever is trained from now on is not in it."""
        ...

    async def write(self, folder: Path) -> Sequence[str]:
        """Write the copy and a `huggingface/` export below `folder`; the paths of the files.

        Other methods may be called meanwhile.
        """
        ...

    async def load(self, folder: Path) -> None:
        """Continue from what `write` wrote."""
        ...
