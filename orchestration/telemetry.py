"""Where metrics go, and the clock that says which phase of a step took how long.

Refuses to know what a metric means to an algorithm; names follow the metrics that users of the
field look for (docs/run-directory.md lists them).
"""

from __future__ import annotations

import importlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# TensorBoard ships no annotations; whether mypy minds is a matter of its settings.
from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped, unused-ignore]
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped, unused-ignore]

from grpo.engines import RolloutEngine
from grpo.errors import UserError
from grpo.types import LoadReport, Rollout, SampleRequest, WeightRef
from orchestration.run_directory import RunDirectory

TRACKER_FOLDER = "tensorboard"
SAMPLING = "sampling"  # the phase in which some engine has work


class Sink(Protocol):
    """Takes the metrics of one step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def turn_back(self, step: int) -> None:
        """The steps after this one will be done again."""
        ...

    def close(self) -> None: ...


class Telemetry:
    """Passes the metrics of every step to metrics.jsonl and to the trackers of the recipe."""

    def __init__(self, run: RunDirectory, trackers: Sequence[Sink]) -> None:
        self._run = run
        self._trackers = trackers

    @classmethod
    def open(
        cls,
        run: RunDirectory,
        trackers: Sequence[str],
        *,
        config: Mapping[str, object],
        resumed_step: int | None = None,
    ) -> Telemetry:
        """`resumed_step`: trackers forget what they were told about later steps."""
        makers: dict[str, Callable[[], Sink]] = {
            "tensorboard": lambda: TensorBoardSink(run.path / TRACKER_FOLDER),
            "wandb": lambda: WandbSink(run.path, config),
        }
        telemetry = cls(run, [makers[tracker]() for tracker in trackers])
        if resumed_step is not None:
            telemetry.turn_back(resumed_step)
        return telemetry

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one step, written everywhere."""
        values = {name: float(value) for name, value in metrics.items()}
        self._run.append_metrics(step, values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def turn_back(self, step: int) -> None:
        """Trackers forget what they were told about later steps; metrics.jsonl is cut elsewhere."""
        for tracker in self._trackers:
            tracker.turn_back(step)

    def close(self) -> None:
        """Flush and close the trackers; the run directory stays open."""
        for tracker in self._trackers:
            tracker.close()


class TensorBoardSink:
    """An event file written without torch or TensorFlow, which take seconds to import."""

    def __init__(self, folder: Path) -> None:
        self._writer = event_file_writer.EventFileWriter(str(folder))

    def turn_back(self, step: int) -> None:
        # TensorBoard hides what it was told before from the step of this event on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
        ]
        self._writer.add_event(
            event_pb2.Event(
                wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)
            )
        )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; the run's folder name is its id, so that a resumed run goes on there."""

    def __init__(self, run: Path, config: Mapping[str, object]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise UserError(
                "trackers: [wandb] needs the package wandb, which is not installed. "
                "Run `pip install wandb`, or remove it from `trackers`"
            ) from error
        self._run = wandb.init(
            project="covey",
            id=run.name,
            name=run.name,
            dir=run,
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def turn_back(self, step: int) -> None:
        """Nothing: it keeps what it was told first about a step, and warns of what comes later."""

    def close(self) -> None:
        self._run.finish()


class PhaseClock:
    """Wall seconds by named phase. A phase that several tasks are in at once counts once."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.totals: dict[str, float] = defaultdict(float)  # since the clock was made
        self._now = now
        self._lap: dict[str, float] = defaultdict(float)
        self._inside: Counter[str] = Counter()  # tasks in each phase
        self._since: dict[str, float] = {}  # when time was last added to a phase in progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent in the block."""
        if not self._inside[name]:
            self._since[name] = self._now()
        self._inside[name] += 1
        try:
            yield
        finally:
            self._settle(name)
            self._inside[name] -= 1
            if not self._inside[name]:
                del self._since[name]

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap; a phase in progress is counted up to now."""
        for name in list(self._since):
            self._settle(name)
        lap, self._lap = dict(self._lap), defaultdict(float)
        return lap

    def _settle(self, name: str) -> None:
        now = self._now()
        self._lap[name] += now - self._since[name]
        self.totals[name] += now - self._since[name]
        self._since[name] = now


class ClockedEngine:
    """A rollout engine that tells the clock when it has something to sample."""

    def __init__(self, engine: RolloutEngine, clock: PhaseClock) -> None:
        self._engine = engine
        self._clock = clock

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """The engine's rollouts."""
        with self._clock.phase(SAMPLING):
            return await self._engine.sample(requests)

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        """The engine's report."""
        return await self._engine.load_weights(ref)


def idle_shares(metrics: Mapping[str, float], phases_s: Mapping[str, float]) -> dict[str, float]:
    """Share of the step in which the learner did not train, and no engine had work.

    `metrics` of the step holds its times; `phases_s` is the clock's lap of the same step.
    """
    step_s = metrics["timing_s/step"]
    sampling_s = phases_s.get(SAMPLING, 0.0)  # no entry: no engine had work
    return {
        "idle/rollout": max(0.0, 1.0 - sampling_s / step_s),
        "idle/learner": max(0.0, 1.0 - metrics["timing_s/train"] / step_s),
    }
